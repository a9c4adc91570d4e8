"""The published table of errors: every operator and dtype against float64, beside plain PyTorch.

`bigmodel-kernels verify --write docs/numerics.md` makes it from the results of a run and puts it between the
markers of the document. It has no judgement of its own: that is `verify.compare`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bigmodel_kernels.bench import machine
from bigmodel_kernels.verify import GRADIENT, Verdict

BEGIN, END = "<!-- verify: begin -->", "<!-- verify: end -->"
KINDS = {"forward": "Results", "gradient": "Gradients"}
_NUMBERS = ("max", "eager_max", "mean", "eager_mean")


def errors(verdicts: Mapping[str, Verdict]) -> dict[str, dict[str, float]]:
    """For the outputs of a case, and for its gradients if it has any: the largest error and the mean of the
    mean errors, here and of plain PyTorch.
    """
    groups: dict[str, list[Verdict]] = {}
    for name, verdict in verdicts.items():
        groups.setdefault("gradient" if name.startswith(GRADIENT) else "forward", []).append(verdict)
    return {
        kind: {
            "max": max(v.max_error for v in members),
            "eager_max": max(v.eager_max for v in members),
            "mean": sum(v.mean_error for v in members) / len(members),
            "eager_mean": sum(v.eager_mean for v in members) / len(members),
        }
        for kind, members in groups.items()
    }


def check_document(path: Path) -> None:
    """Raises OSError for what cannot be read, ValueError for a document without the two markers."""
    _cut(path.read_text(encoding="utf-8"))


def write(path: Path, results: Sequence[Mapping[str, Any]], device: str) -> None:
    """Replaces what is between the markers of the document by the tables of these results.

    results: those of `bigmodel-kernels verify --json`. Raises as `check_document` does.
    """
    before, after = _cut(path.read_text(encoding="utf-8"))
    path.write_text(f"{before}{BEGIN}\n{text(results, device)}{END}{after}", encoding="utf-8")


def _cut(document: str) -> tuple[str, str]:
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"it must have a line {BEGIN} and after it a line {END}")
    return before, after


def text(results: Sequence[Mapping[str, Any]], device: str) -> str:
    """One table for results and one for gradients, a row for each operator and dtype that ran."""
    where = f"`{device}`"
    if torch.device(device).type == "cpu" and (isa := machine.instruction_set()) is not None:
        where += f", instruction set `{isa}`"
    lines = ["", f"By `bigmodel-kernels verify --write` with torch {torch.__version__} on {where}.", ""]
    for kind, title in KINDS.items():
        lines += [
            f"### {title}",
            "",
            "| Operator | dtype | backend | cases | max, here | max, PyTorch | mean, here | mean, PyTorch |",
            "|---|---|---|---|---|---|---|---|",
            *rows(results, kind),
            "",
        ]
    return "\n".join(lines)


def rows(results: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    """The largest error of all cases, and the mean over the cases of their mean errors."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        if kind in result["errors"]:
            groups.setdefault((result["op"], result["dtype"]), []).append(result)
    lines = []
    for (op, dtype), members in groups.items():
        found = {name: [m["errors"][kind][name] for m in members] for name in _NUMBERS}
        numbers = [
            max(values) if name.endswith("max") else sum(values) / len(values)
            for name, values in found.items()
        ]
        used = ", ".join(dict.fromkeys(m["backend"] for m in members))
        cells = [f"`{op}`", dtype, used, str(len(members)), *(f"{number:.1e}" for number in numbers)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
