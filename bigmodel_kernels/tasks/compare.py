"""The same texts by the model as transformers has it and patched, in turn: results, time and memory.

A time is that of the whole task: tokenizing, model, decoding. All twins share one set of weights.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import bigmodel_kernels as bk
from bigmodel_kernels.bench import memory
from bigmodel_kernels.bench.timing import Contender, race
from bigmodel_kernels.tasks.base import Record, Say, Task
from bigmodel_kernels.transformers.attention_interface import set_implementation

EAGER, PATCHED = "eager", "patched"


def twins(model: Any) -> dict[str, Any]:
    """The model as eager, and as what transformers takes by itself if that is another, with its weights."""
    own = model.config._attn_implementation
    found = {}
    for name in dict.fromkeys((EAGER, own)):
        found[name] = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        set_implementation(found[name], name)
    return found


def compare(
    task: Task, models: dict[str, Any], batches: list[list[str]], device: str, budget_s: float, say: Say
) -> tuple[dict[str, Any], list[Record]]:
    """Median times, peak memory, how far results agree with eager's; and the results of the patched model.

    Memory is what one run of the first batch, the one with the longest texts, takes at its peak beyond what
    was held before.
    """
    runners = {name: task.runner(model) for name, model in models.items()}
    peaks = {}
    for name, runner in runners.items():
        say(f"memory of {name}")
        job = functools.partial(runner, batches[0])
        job()  # what is made once, such as packed copies of weights, is not part of a run
        peaks[name] = memory.peak(Contender(name, job), device)
    timings, passes = race(runners, batches, device, budget_s=budget_s, say=say)
    results = {name: [record for batch in found for record in batch] for name, found in passes.items()}
    expected = results[EAGER]
    rows = {}
    for name, timing in timings.items():
        rows[name] = {
            "seconds": timing.to_dict(),
            "per_second": task.units(results[name]) / timing.median_s,
            "speedup_to_eager": timings[EAGER].median_s / timing.median_s,
            "peak_bytes": peaks[name],
            "agreement": None if name == EAGER else task.agreement(expected, results[name]),
        }
    found = {
        "unit": task.unit,
        "rounds": timings[EAGER].samples,
        "rows": rows,
        "packed_weights_bytes": bk.explain(models[PATCHED]).packed_bytes,
    }
    return found, results[PATCHED]
