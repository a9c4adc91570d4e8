"""Runs every check on the tiny model of every family."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bigmodel_kernels.models import checks
from bigmodel_kernels.models.tiny import PADDINGS, TINY, Tiny, inputs_of
from bigmodel_kernels.transformers import families

OK, LEFT, FAILED = "ok", "left alone", "FAILED"


class LeftAlone(Exception):
    """A check that does not concern a model; the message says why."""


@dataclass(frozen=True)
class Cell:
    """What came of a check. `part`: the largest error as a part of what is allowed, of those that measure."""

    status: str
    detail: str = ""
    part: float | None = None


@dataclass(frozen=True)
class FamilyRow:
    """A family's line: what is patched in its tiny model, and the cell of each check."""

    family: str
    architecture: str
    modules: dict[str, int]
    ops: tuple[str, ...]
    left: dict[str, str]
    cells: dict[str, Cell]
    seconds: float

    @property
    def ok(self) -> bool:
        return all(cell.status != FAILED for cell in self.cells.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {**asdict(self), "ops": list(self.ops), "ok": self.ok}


# ------------------------------------------------------------------------------------------------------------
# checks, by the names of their columns


def _near(tiny: Tiny, dtype: torch.dtype) -> float:
    model = tiny.model().to(dtype)
    return checks.check_outputs(model, inputs_of(model))


def _padded(tiny: Tiny, side: str) -> float:
    model = tiny.model()
    return checks.check_forward(model, inputs_of(model, PADDINGS[side]), alone=tiny.alone)


def _generated(tiny: Tiny, kind: str) -> None:
    model = tiny.model()
    if not model.can_generate():
        raise LeftAlone(f"{tiny.architecture} does not generate")
    inputs = {k: v for k, v in inputs_of(model, PADDINGS["left"]).items() if not k.startswith("decoder_")}
    checks.check_generation(model, inputs, kind, new=8)


def _attentions(tiny: Tiny) -> float:
    model = tiny.model()
    return checks.check_outputs(model, inputs_of(model), attentions=True)


def _gradients(tiny: Tiny) -> float:
    model = tiny.model()
    return checks.check_gradients(model, inputs_of(model))


def _compiled(tiny: Tiny) -> float:
    model = tiny.model()
    without_cache: dict[str, Any] = {"use_cache": False} if model.can_generate() else {}
    try:
        return checks.check_forward(model, inputs_of(model), compiled=True, **without_cache)
    finally:
        torch._dynamo.reset()


def _unpatched(tiny: Tiny) -> None:
    model = tiny.model()
    checks.check_unpatching(model, inputs_of(model))


def _copied(tiny: Tiny) -> None:
    model = tiny.model()
    checks.check_copies(model, inputs_of(model))


def _saved(tiny: Tiny) -> None:
    model = tiny.model()
    with tempfile.TemporaryDirectory() as folder:
        checks.check_saving(model, inputs_of(model), Path(folder))


CHECKS: dict[str, Callable[[Tiny], float | None]] = {
    "float32": lambda tiny: _near(tiny, torch.float32),
    "bfloat16": lambda tiny: _near(tiny, torch.bfloat16),
    "padding right": lambda tiny: _padded(tiny, "right"),
    "padding left": lambda tiny: _padded(tiny, "left"),
    "greedy": lambda tiny: _generated(tiny, "greedy"),
    "beams": lambda tiny: _generated(tiny, "beams"),
    "attentions": _attentions,
    "gradients": _gradients,
    "compile": _compiled,
    "unpatch": _unpatched,
    "copies": _copied,
    "save and load": _saved,
}


# ------------------------------------------------------------------------------------------------------------
# the table


def chosen(names: Iterable[str] | None) -> list[str]:
    """The families asked for, or all. Raises ValueError for one that there is not."""
    known = families.names()
    for name in names or ():
        if name not in known:
            raise ValueError(f"family={name!r} is unknown; allowed are {', '.join(known)}")
    return list(dict.fromkeys(names or known))


def chosen_checks(names: Iterable[str] | None) -> list[str]:
    """The checks asked for, or all. Raises ValueError for one that there is not."""
    for name in names or ():
        if name not in CHECKS:
            raise ValueError(f"check={name!r} is unknown; allowed are {', '.join(CHECKS)}")
    return list(dict.fromkeys(names or CHECKS))


def run_family(
    name: str, only: Iterable[str] | None = None, progress: Callable[[str], None] | None = None
) -> FamilyRow:
    """Every check, or those of `only`, on a family; `progress` is called with what was done."""
    start = time.perf_counter()
    wanted = chosen_checks(only)
    tiny = TINY.get(name)
    if tiny is None:
        cell = Cell(FAILED, "bigmodel_kernels/models/tiny.py has no model of this family")
        return FamilyRow(name, "", {}, (), {}, dict.fromkeys(wanted, cell), 0.0)
    report, problem = None, None
    try:
        report = checks.check_report(tiny.model())
    except Exception as error:  # what is wrong with one family is a finding, and the others go on
        problem = Cell(FAILED, _described(error))
    cells = {}
    for check in wanted:
        cells[check] = problem or _cell(tiny, check)
        if progress is not None:
            progress(f"{name}: {check}")
    return FamilyRow(
        family=name,
        architecture=tiny.architecture,
        modules=_counted(row.module for row in report.patched) if report else {},
        ops=tuple(dict.fromkeys(op for row in report.patched for op in row.ops)) if report else (),
        left={row.name: row.reason for row in report.left_alone} if report else {},
        cells=cells,
        seconds=time.perf_counter() - start,
    )


def _cell(tiny: Tiny, check: str) -> Cell:
    reason = tiny.lacks.get(check)
    if reason is not None:
        return Cell(LEFT, reason)
    try:
        return Cell(OK, part=CHECKS[check](tiny))
    except LeftAlone as why:
        return Cell(LEFT, str(why))
    except Exception as error:  # likewise
        return Cell(FAILED, _described(error))


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"


def _counted(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts
