"""The same training eager and patched: loss curves, scores over seeds, time per step and memory.

Dropout is 0, so that the two runs of a seed differ by rounding alone. Training makes small differences grow,
so a number for their distance says nothing by itself. The yardstick is, for each seed, the distance of two
runs of transformers alone that round their sums in another order: on the CPU eager with another number of
threads, on a GPU sdpa. Patched and eager are the same training if no seed's curves are further apart than the
yardstick's furthest, and the mean scores no further than eager's own over the seeds. Each run is a process of
its own, so that memory and caches of one do not count for the other.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from bigmodel_kernels import files
from bigmodel_kernels.extras import package
from bigmodel_kernels.finetune.run import complete, finetune
from bigmodel_kernels.finetune.settings import Settings
from bigmodel_kernels.finetune.tasks import TASKS

Say = Callable[[str, int, int], None]


def kinds(settings: Settings) -> tuple[str, str, str]:
    """What is run for each seed: eager, patched, and the yardstick by its name."""
    if torch.device(settings.device).type != "cpu":
        return "eager", "patched", "sdpa"
    return "eager", "patched", f"eager-{_other_threads(settings)}-threads"


def _threads(settings: Settings) -> int:
    return settings.threads or torch.get_num_threads()


def _other_threads(settings: Settings) -> int:
    return 2 if _threads(settings) == 1 else 1


def plan(settings: Settings, seeds: Sequence[int]) -> dict[str, Settings]:
    """The runs by name, a kind and a seed: of each seed eager, patched and the yardstick."""
    settings = complete(settings)
    runs: dict[str, Settings] = {}

    def add(kind: str, seed: int) -> None:
        name, implementation = f"{kind}-{seed}", kind.partition("-")[0]
        runs[name] = replace(
            settings,
            implementation=implementation,
            seed=seed,
            threads=_threads(settings) if kind == implementation else _other_threads(settings),
            dropout=0.0,
            fused_loss=settings.fused_loss and implementation == "patched",
            recompute=settings.recompute and implementation == "patched",
            output=str(settings.folder / name),
        )

    for seed in seeds:
        for kind in kinds(settings):
            add(kind, seed)
    return runs


def compare(
    settings: Settings,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    resume: bool = False,
    isolated: bool = True,
    say: Say = lambda name, step, steps: None,
) -> dict[str, Any]:
    """Runs what `plan` says in folders of `settings.output`, and writes compare.json and compare.png there.

    With `resume` finished runs are read and unfinished ones continued. `isolated=False` runs everything in
    this process; then memory is not compared. Raises what `finetune` raises, and RuntimeError with the end of
    its log where a process fails.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds={list(seeds)}; it must hold different numbers, one at least")
    runs = plan(settings, seeds)
    folder = settings.folder
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise ValueError(
            f"output={str(folder)!r} is not empty, and nothing is overwritten: take another folder, or "
            "continue the comparison with --resume"
        )
    results = {}
    for name, run in runs.items():
        done = run.folder / "result.json"
        if not done.is_file():
            started = (run.folder / "settings.json").is_file()
            if isolated:
                _in_a_process(name, run, started, say)
            else:
                finetune(run, resume=started)
        results[name] = json.loads(done.read_text(encoding="utf-8"))
        if results[name]["settings"] != run.to_dict():
            raise ValueError(f"{done} is of a run with other settings; take another folder")
    yardstick = kinds(settings)[-1]
    found = summarise(results, list(seeds), yardstick, TASKS[settings.task].main_metric, isolated)
    files.write_json(folder / "compare.json", found)
    _plot(results, list(seeds), yardstick, folder / "compare.png")
    return found


def arguments(settings: Settings) -> list[str]:
    """The settings as options of the command."""
    words = [settings.task, f"--{settings.implementation}"]
    for field in fields(Settings):
        value = getattr(settings, field.name)
        if field.name in ("task", "implementation") or value == field.default:
            continue
        if field.name == "columns":
            words += [word for pair in value for word in ("--column", pair)]
        else:
            name = f"--{field.name.replace('_', '-')}"
            words += [name] if value is True else [name, str(value)]
    return words


def _in_a_process(name: str, run: Settings, started: bool, say: Say) -> None:
    log = run.folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bigmodel_kernels.cli", "finetune", *arguments(run)]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, *(["--resume"] if started else [])],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on once
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                lines = files.read_lines(run.folder / "metrics.jsonl")
                say(name, max((line["step"] for line in lines), default=0), run.steps or 0)
        finally:
            if process.poll() is None:  # stopped here: the run leaves a checkpoint
                process.terminate()
                process.wait()
    if process.returncode:
        end = log.read_text(encoding="utf-8")[-2000:]
        raise RuntimeError(f"the run {name} ended with code {process.returncode}: {end}")


def distance(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Between two loss curves: the largest, the mean and the last absolute difference."""
    if len(a) != len(b) or not a:
        raise ValueError(f"curves of {len(a)} and {len(b)} steps; they must have as many, one at least")
    apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return {"max": max(apart), "mean": statistics.fmean(apart), "last": apart[-1]}


def summarise(
    results: dict[str, dict[str, Any]], seeds: list[int], yardstick: str, metric: str, memory: bool
) -> dict[str, Any]:
    """The comparison from the results of all runs; `yardstick` is the kind of the third."""
    losses = {name: result["losses"] for name, result in results.items()}
    each: dict[str, Any] = {}
    for kind in ("eager", "patched"):
        mine = [results[f"{kind}-{seed}"] for seed in seeds]
        scores = [result["metrics"][metric] for result in mine]
        each[kind] = {
            "score": {
                "mean": statistics.fmean(scores),
                "least": min(scores),
                "most": max(scores),
                "all": scores,
            },
            "step_s": statistics.median(result["facts"]["median_step_s"] for result in mine),
            "tokens_per_second": statistics.median(r["facts"]["tokens_per_second"] for r in mine),
            "peak_memory_bytes": max(r["facts"]["peak_memory_bytes"] or 0 for r in mine) if memory else None,
        }
    apart = {
        kind: {str(s): distance(losses[f"eager-{s}"], losses[f"{kind}-{s}"]) for s in seeds}
        for kind in ("patched", yardstick)
    }
    furthest = {kind: max(numbers["max"] for numbers in of.values()) for kind, of in apart.items()}
    eager = each["eager"]["score"]
    first = seeds[0]
    return {
        "task": results[f"eager-{first}"]["settings"]["task"],
        "metric": metric,
        "seeds": seeds,
        "steps": len(losses[f"eager-{first}"]),
        "threads": results[f"eager-{first}"]["facts"]["threads"],
        "distance": apart["patched"],
        "yardstick": {"kind": yardstick, "distance": apart[yardstick]},
        "losses_agree": furthest["patched"] <= furthest[yardstick],
        "scores_agree": abs(each["patched"]["score"]["mean"] - eager["mean"])
        <= eager["most"] - eager["least"],
        "runs": each,
        "speedup": each["eager"]["step_s"] / each["patched"]["step_s"],
        "patch_report": results[f"patched-{first}"]["facts"]["patch_report"],
        "settings": results[f"eager-{first}"]["settings"],
        "versions": results[f"eager-{first}"]["facts"]["versions"],
    }


def _plot(results: dict[str, dict[str, Any]], seeds: list[int], yardstick: str, path: Path) -> None:
    package("matplotlib", "matplotlib", "finetune")
    from matplotlib.figure import Figure

    from bigmodel_kernels.finetune.plot import smoothed

    losses = {name: result["losses"] for name, result in results.items()}
    steps = range(1, len(losses[f"eager-{seeds[0]}"]) + 1)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, seed in enumerate(seeds):
        left.plot(steps, smoothed(losses[f"eager-{seed}"]), color=f"C{i}", label=f"eager, seed {seed}")
        # Thin and black on top: most often it is the same line.
        ours = smoothed(losses[f"patched-{seed}"])
        left.plot(steps, ours, "k--", linewidth=0.7, label="patched" if i == 0 else None)
    left.set(xlabel="step", ylabel="training loss, smoothed")
    left.legend()
    floor = 1e-9  # equal losses have no place on a logarithmic axis
    for kind, colour in (("patched", "C0"), (yardstick, "C1")):
        for i, seed in enumerate(seeds):
            pairs = zip(losses[f"eager-{seed}"], losses[f"{kind}-{seed}"], strict=True)
            apart = [max(abs(a - b), floor) for a, b in pairs]
            label = f"{kind} and eager" if i == 0 else None
            right.plot(steps, apart, colour, label=label, linewidth=0.9, alpha=0.7)
    right.set(xlabel="step", ylabel="difference of the losses, each seed", yscale="log")
    right.legend()
    figure.savefig(path, dpi=120)
