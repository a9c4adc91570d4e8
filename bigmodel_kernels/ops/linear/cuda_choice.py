"""Which product the CUDA row of linear runs: the library's kernel, or torch's (cuBLAS), as measured.

The library's kernel adds bias, activation and residual in one launch; torch's product may be faster by
itself, and leaves the rest to launches of their own. Which is sooner depends on device and shape, and only a
GPU can say. Where none has, a call with anything to add but a bias takes the library's kernel, and `explain`
says "not measured".

    python -m bigmodel_kernels.ops.linear.cuda_choice       for BERT's and GPT-2's layers on this GPU

writes cuda_choice.json beside this file: the milliseconds of both for each device and case. A call takes the
case that is like it but for the number of rows, of those the nearest, at most four times as many or as few;
where nobody has measured its device, of another of the same compute capability.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bigmodel_kernels.ops.cuda_library import captured

FILE = Path(__file__).with_name("cuda_choice.json")
OWN, TORCH = "the library's kernel", "torch's product"

Kind = tuple[int, int, str, str]


@dataclass(frozen=True)
class Case:
    """What the time depends on."""

    dtype: str
    features: int
    out: int
    layout: str
    finish: str  #: what comes after the product, such as "gelu" or "none + residual + layer_norm"
    rows: int

    @property
    def kind(self) -> Kind:
        """All but the number of rows, and which type of 16 bits."""
        return self.features, self.out, self.layout, self.finish


@dataclass(frozen=True)
class Choice:
    """The product that runs a call, and why."""

    product: str
    why: str

    def __str__(self) -> str:
        return f"{self.product}, {self.why}"


@dataclass(frozen=True)
class Measured:
    """What one device took: for each kind of case the rows, with the milliseconds of both products."""

    device: str
    capability: str
    kinds: dict[Kind, list[tuple[int, dict[str, float]]]]


@functools.cache
def measurements() -> list[Measured]:
    """All that the file holds."""
    if not FILE.exists():
        return []
    devices = []
    for device, found in json.loads(FILE.read_text()).items():
        kinds: dict[Kind, list[tuple[int, dict[str, float]]]] = {}
        for entry in found["cases"]:
            case = Case(**entry["case"])
            kinds.setdefault(case.kind, []).append((case.rows, entry["milliseconds"]))
        devices.append(Measured(device, found["capability"], kinds))
    return devices


def choose(device: str, capability: str, case: Case) -> Choice:
    """The faster of the nearest case; if there is none, the library's where torch's leaves work to do.

    Every call of a product asks, and on a GPU what the host takes is waited for: nothing here may be slow.
    """
    known = [m for m in measurements() if m.device == device]
    known = known or [m for m in measurements() if m.capability == capability]
    alike = known[0].kinds.get(case.kind, []) if known and case.rows else []
    near = [(abs(math.log2(case.rows / rows)), rows, times) for rows, times in alike]
    distance, rows, times = min(near, key=lambda entry: entry[0], default=(math.inf, 0, {}))
    if distance > 2 and case.finish == "none":
        return Choice(TORCH, "which has the bias in it too, and nothing else is to be done")
    if distance > 2:
        return Choice(OWN, "not measured for this device and shape")
    best = min((OWN, TORCH), key=times.__getitem__)
    slower = TORCH if best == OWN else OWN
    where = "" if known[0].device == device else f" on {known[0].device}"
    return Choice(
        best,
        f"{times[best]:.3f} ms against {times[slower]:.3f} of {slower} at {rows} rows, measured{where}",
    )


def measure(
    cases: Iterator[tuple[Case, dict[str, Callable[[], Any]]]],
    clock: Callable[[Callable[[], Any]], Callable[[], float]],
) -> list[dict[str, Any]]:
    """Times the functions of both products, in turn, 20 times each; `clock` makes of one its clock."""
    entries = []
    for case, functions in cases:
        times: dict[str, list[float]] = {name: [] for name in functions}
        clocks = {name: clock(function) for name, function in functions.items()}
        for _ in range(20):
            for name, sample in clocks.items():
                times[name].append(sample())
        medians = {name: round(statistics.median(all_), 5) for name, all_ in times.items()}
        entries.append({"case": asdict(case), "milliseconds": medians})
    return entries


def models_cases(device: torch.device) -> Iterator[tuple[Case, dict[str, Callable[[], Any]]]]:
    """The layers of BERT and GPT-2, base and large, for 128 to 32768 tokens."""
    from bigmodel_kernels import _native
    from bigmodel_kernels.ops.linear import cuda, prepare

    if reason := _native.cuda_reason():
        sys.exit(reason)
    for hidden in (384, 768, 1024):
        for features, out, extra in (
            (hidden, hidden, {"residual": True, "norm": True}),
            (hidden, 4 * hidden, {"activation": "gelu"}),
            (4 * hidden, hidden, {"residual": True, "norm": True}),
            (hidden, 4 * hidden, {"activation": "gelu_tanh", "weight_layout": "conv1d"}),
            (4 * hidden, hidden, {"residual": True, "weight_layout": "conv1d"}),
        ):
            for rows in (128, 512, 2048, 8192, 32768):
                options: dict[str, Any] = dict(extra)
                make = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
                if options.pop("residual", False):
                    options["residual"] = make(rows, out)
                if options.pop("norm", False):
                    options |= {"norm_weight": make(out), "norm_bias": make(out)}
                conv1d = options.get("weight_layout") == "conv1d"
                weight = make((features, out) if conv1d else (out, features))
                args, kwargs = prepare(make(rows, features), weight, make(out), **options)
                yield (
                    cuda.case_of(*args, **kwargs),
                    {
                        name: functools.partial(cuda.run, *args, **kwargs, product=name)
                        for name in (OWN, TORCH)
                    },
                )


def gpu_clock(function: Callable[[], Any]) -> Callable[[], float]:
    """Milliseconds of ten calls over ten, in a CUDA graph: what Python takes is not in them."""
    replay = captured(function, 10)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 10

    return sample


def main() -> None:
    if sys.argv[1:]:
        print(__doc__)
        return
    if not torch.cuda.is_available():
        sys.exit("no GPU is here to measure")
    device = torch.device("cuda", torch.cuda.current_device())
    entries = measure(models_cases(device), gpu_clock)
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    found[torch.cuda.get_device_name(device)] = {"capability": capability, "cases": entries}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    for entry in entries:
        print(entry["case"], entry["milliseconds"])


if __name__ == "__main__":
    main()
