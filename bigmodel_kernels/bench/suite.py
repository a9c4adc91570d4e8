"""Suites of cases, and how they become a document of rows."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bigmodel_kernels.bench import machine, memory
from bigmodel_kernels.bench.timing import Contender, LeftOut, Measured, measure, reason

OURS = "bigmodel"
#: A row whose samples spread more than this, between the quartiles, is marked as noisy.
NOISY = 0.20
#: Largest difference from the peer's result, as a part of its largest number, with which a time counts: a few
#: roundings of the dtype, gathered over a model's layers. Generated tokens must be the same.
AGREES = {"float32": 1e-3, "bfloat16": 2**-4, "float16": 2**-7}


@dataclass(frozen=True)
class Case:
    """A label, a dtype ("float32", "bfloat16", "float16") and whatever sizes the suite's `build` reads."""

    label: str
    dtype: str
    sizes: Mapping[str, Any]


class Shared:
    """What takes long to build and serves several cases of a suite that follow each other. Of each name it
    has one thing, for the sake of memory: another key, and the end of the suite, release it. A failure is
    kept too, as its reason.
    """

    def __init__(self) -> None:
        self._built: dict[str, tuple[Any, Any]] = {}

    def get(self, name: str, key: Any, build: Callable[[], Any]) -> Any:
        """What `build` made for this key. Raises LeftOut where it has failed before."""
        if name not in self._built or self._built[name][0] != key:
            self._built.pop(name, None)
            gc.collect()
            try:
                self._built[name] = key, build()
            except Exception as error:
                # Not the error itself, which would hold the memory of every frame that it came through.
                self._built[name] = key, LeftOut(reason(error))
                raise
            gc.collect()
            memory.give_back()  # an export needs several times what it leaves
        found = self._built[name][1]
        if isinstance(found, LeftOut):
            raise LeftOut(str(found))
        return found

    def clear(self) -> None:
        self._built.clear()
        gc.collect()
        memory.give_back()


@dataclass(frozen=True)
class Setting:
    """Where and how a case runs, and against whom: with `compile` also torch.compile, with `peers` also the
    runtimes of peers.py.
    """

    device: str = "cpu"
    compile: bool = False
    peers: bool = False
    shared: Shared = field(default_factory=Shared, repr=False, compare=False)


@dataclass(frozen=True)
class Stage:
    """Arithmetic and memory traffic that no implementation can do without; stages follow each other."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Prepared:
    """What a case builds: who runs, against whom ratios are taken, and what the work is at least.

    `comparable` takes the part of a result that must agree between contenders (real tokens, not padding), and
    is None where they draw random numbers of their own; `items` of `unit` are what a call gets done, for a
    throughput; with `memory` the peak memory of a call is measured too.
    """

    contenders: list[Contender]
    peer: str
    stages: list[Stage]
    comparable: Callable[[Any], torch.Tensor] | None = field(default=lambda result: result)
    items: int | None = None
    unit: str = "tokens"
    memory: bool = False


@dataclass(frozen=True)
class Suite:
    """Cases of one subject; `quick` are small ones that only show that everything works.

    They run under torch.inference_mode, or, in a suite of `training`, with gradients. On a GPU the cases are
    `gpu`, where there are any, and those of single `kernels` are timed in CUDA graphs, where all contenders
    can be captured: without what Python and the launches take.
    """

    name: str
    build: Callable[[Case, Setting], Prepared]
    cases: tuple[Case, ...]
    quick: tuple[Case, ...]
    training: bool = False
    gpu: tuple[Case, ...] = ()
    kernels: bool = False

    def select(self, device: str, quick: bool) -> tuple[Case, ...]:
        """The cases for a device."""
        if quick:
            return self.quick
        return self.gpu if self.gpu and device.startswith("cuda") else self.cases


class SuitesNotFound(ValueError):
    """There is no folder of suites, or no such suite in it."""


def default_folder() -> Path:
    """`benchmarks/` of the source tree that this package was imported from."""
    return Path(__file__).resolve().parents[2] / "benchmarks"


def find(folder: Path | None = None) -> dict[str, Path]:
    """Names of suites and their files: every Python file in `ops/` and `transformers/` of the folder."""
    folder = default_folder() if folder is None else folder
    files = sorted((*folder.glob("ops/*.py"), *folder.glob("transformers/*.py")))
    if not files:
        raise SuitesNotFound(
            f"no suites in {folder}: they come with the source tree, not with the package; "
            "name benchmarks/ of a clone by --suites, or install the clone with -e"
        )
    return {path.stem: path for path in files}


def load(name: str, folder: Path | None = None) -> Suite:
    """The suite that a file holds under the name SUITE."""
    files = find(folder)
    if name not in files:
        raise SuitesNotFound(f"suite={name!r} is unknown; allowed are {', '.join(files)}")
    module = _import(files[name])
    return module.SUITE  # type: ignore[no-any-return]


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bigmodel_benchmark_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py file that exists always has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def floor(prepared: Prepared, dtype: str, device: str, calibration: machine.Calibration) -> tuple[float, str]:
    """The time in which this machine could do the work at best, and what most of it is limited by."""
    peak = calibration.peak(dtype, device)
    compute = [stage.flops / peak for stage in prepared.stages]
    memory = [stage.bytes / calibration.copy_bytes for stage in prepared.stages]
    total = sum(max(c, m) for c, m in zip(compute, memory, strict=True))
    by_memory = sum(m for c, m in zip(compute, memory, strict=True) if m > c)
    return total, "memory" if by_memory > total / 2 else "compute"


def differences(prepared: Prepared, measured: Measured, dtype: str) -> tuple[dict[str, float], list[str]]:
    """Largest difference of each contender's result from the peer's, and who is too far from it.

    A result of another shape, or with numbers that are none, is too far and has no difference.
    """
    theirs = measured.results.get(prepared.peer)
    if theirs is None or prepared.comparable is None:
        return {}, []
    expected = prepared.comparable(theirs)
    whole = not expected.is_floating_point()
    right = expected.double()
    allowed = 0.0 if whole or not right.numel() else AGREES[dtype] * right.abs().max().item()
    found: dict[str, float] = {}
    disagree: list[str] = []
    for name, result in measured.results.items():
        if name == prepared.peer or result is None:
            continue
        difference = math.inf
        # `comparable` may not take a result of another shape.
        if getattr(result, "shape", None) == getattr(theirs, "shape", None):
            value = prepared.comparable(result)
            difference = (value.double() - right).abs().max().item() if value.numel() else 0.0
        if math.isfinite(difference):
            found[name] = difference
        if not difference <= allowed:
            disagree.append(name)
    return found, disagree


def _peaks(prepared: Prepared, measured: Measured, device: str) -> dict[str, int]:
    """Peak memory of a call of everybody who ran: by now all is packed, compiled and tuned."""
    measured.results.update({name: None for name in measured.results if name not in (OURS, prepared.peer)})
    found = {c.name: memory.peak(c, device) for c in prepared.contenders if c.name in measured.timings}
    return {name: size for name, size in found.items() if size is not None}


def run_case(
    suite: Suite, case: Case, setting: Setting, calibration: machine.Calibration, budget_s: float
) -> dict[str, Any]:
    """One row of the document."""
    torch.manual_seed(0)
    with torch.inference_mode(not suite.training):
        prepared = suite.build(case, setting)
        measured = measure(prepared.contenders, setting.device, budget_s, graphs=suite.kernels)
        differs, disagree = differences(prepared, measured, case.dtype)
        peaks = _peaks(prepared, measured, setting.device) if prepared.memory else {}
    floor_s, limited_by = floor(prepared, case.dtype, setting.device, calibration)
    timings = measured.timings
    peer = timings.get(prepared.peer)
    peak, flops = calibration.peak(case.dtype, setting.device), sum(stage.flops for stage in prepared.stages)
    row: dict[str, Any] = {
        "suite": suite.name,
        "case": case.label,
        "dtype": case.dtype,
        "sizes": dict(case.sizes),
        "peer": prepared.peer,
        "times": {name: timing.to_dict() for name, timing in timings.items()},
        # Who computes something else cannot be faster at it.
        "speedup": {n: peer.median_s / t.median_s for n, t in timings.items() if n not in disagree}
        if peer
        else {},
        "flops": flops,
        "bytes": sum(stage.bytes for stage in prepared.stages),
        "floor_s": floor_s,
        "floor_by": limited_by,
        "to_floor": {name: t.median_s / floor_s for name, t in timings.items()},
        "unit": prepared.unit if prepared.items else None,
        "throughput": {name: prepared.items / t.median_s for name, t in timings.items()}
        if prepared.items
        else {},
        "of_peak": {name: flops / t.median_s / peak for name, t in timings.items()},
        "max_difference": differs.get(OURS),
        "differences": differs,
        "disagree": disagree,
        "noisy": any(t.spread > NOISY for t in timings.values()),
        "clock": measured.clock,
        "left_out": measured.left_out,
    }
    if peaks:
        row["peak_bytes"] = peaks
    del prepared, measured
    gc.collect()
    if setting.device.startswith("cuda"):
        torch.cuda.empty_cache()
    return row


def select(
    suites: Iterable[Suite],
    quick: bool = False,
    dtypes: Iterable[str] | None = None,
    only: str = "",
    device: str = "cpu",
) -> list[tuple[Suite, Case]]:
    """The cases of these dtypes whose labels have `only` in them. Raises ValueError when there are none."""
    wanted = None if dtypes is None else set(dtypes)
    chosen = [
        (suite, case)
        for suite in suites
        for case in suite.select(device, quick)
        if (wanted is None or case.dtype in wanted) and only in case.label
    ]
    if not chosen:
        raise ValueError(f"only={only!r}: no case of these suites and dtypes has it in its label")
    return chosen


def run(
    suites: Iterable[Suite],
    setting: Setting,
    *,
    quick: bool = False,
    budget_s: float = 4.0,
    dtypes: Iterable[str] | None = None,
    only: str = "",
    progress: Callable[[str], None] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Runs the suites and returns the document (see document.py); `only` is a part of the labels to run.

    The GEMM ceiling and the copy bandwidth are measured before the first case and after the last one. An
    interrupt ends the run with the rows that are there, and the document says so. `save` gets such a document
    after every case: what would be left if the process were killed then.
    """
    work = select(suites, quick, dtypes, only, setting.device)
    names = sorted({"float32", *(case.dtype for _, case in work)}, reverse=True)
    say = progress or (lambda text: None)
    others = machine.OtherLoad()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    say("calibration")
    facts = machine.facts(setting.device)
    start = machine.calibrate(setting.device, names, quick)
    rows: list[dict[str, Any]] = []

    def document(end: machine.Calibration | None, interrupted: bool) -> dict[str, Any]:
        share = others.share()
        trust = machine.trust(start, end or start, share)
        if end is None:
            trust = machine.Trust(False, ["the end of the run was not measured", *trust.reasons])
        return {
            "schema": 1,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "quick": quick,
            "interrupted": interrupted,
            "peers": setting.peers,
            "budget_s": budget_s,
            "machine": {**facts, "load_at_start": load, "other_load": share},
            "calibration": {"start": start.to_dict(), "end": (end or start).to_dict()},
            "trust": trust.to_dict(),
            "rows": rows,
        }

    interrupted = False
    try:
        for suite, group in itertools.groupby(work, key=lambda pair: pair[0]):
            for _, case in group:
                say(f"{suite.name}: {case.label} {case.dtype}")
                rows.append(run_case(suite, case, setting, start, budget_s))
                if save is not None:
                    save(document(None, interrupted=True))
            setting.shared.clear()
    except KeyboardInterrupt:  # what has been measured is not lost
        if not rows:
            raise
        interrupted = True
    setting.shared.clear()
    end = None
    with contextlib.suppress(KeyboardInterrupt):
        if not interrupted:
            say("calibration")
        end = machine.calibrate(setting.device, names, quick)
    return document(end, interrupted)
