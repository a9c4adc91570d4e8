"""What `patch` did, or would do, module by module."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

PATCHED = "patched"
LEFT = "left alone"
ALREADY = "already patched"


@dataclass(frozen=True)
class Row:
    """One module: what it runs now and on which backend, or why it was left alone."""

    name: str
    module: str
    status: str
    ops: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    reason: str = ""

    @property
    def uses(self) -> str:
        if not self.ops:
            return ""
        if len(set(self.backends)) == 1:
            return f"{' + '.join(self.ops)} [{self.backends[0]}]"
        return " + ".join(f"{op} [{backend}]" for op, backend in zip(self.ops, self.backends, strict=False))


@dataclass
class PatchReport:
    """Rows per module, totals, memory of packed weights and versions; `str()` is a plain table.

    `packed_bytes` is what packed copies of the patched weights take in memory now; `packed_bytes_at_most`
    what they will take once every patched layer has run on a backend that packs. Both are 0 where the backend
    reads weights as they are.
    """

    model: str
    rows: list[Row]
    packed_bytes: int
    packed_bytes_at_most: int
    transformers_version: str
    torch_version: str
    notes: list[str] = field(default_factory=list)
    applied: bool = True

    @property
    def patched(self) -> list[Row]:
        """Modules that run our operators: patched now or before."""
        return [row for row in self.rows if row.status in (PATCHED, ALREADY)]

    @property
    def left_alone(self) -> list[Row]:
        return [row for row in self.rows if row.status == LEFT]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        rows = [{**asdict(row), "ops": list(row.ops), "backends": list(row.backends)} for row in self.rows]
        return {
            **asdict(self),
            "rows": rows,
            "patched": len(self.patched),
            "left_alone": len(self.left_alone),
        }

    def __str__(self) -> str:
        verb = "is patched" if self.applied else "would be patched"
        lines = [
            f"{self.model} {verb}: {len(self.patched)} modules use bigmodel operators, "
            f"{len(self.left_alone)} left alone (transformers {self.transformers_version}, "
            f"torch {self.torch_version})"
        ]
        cells = [("module", "class", "runs"), *self._cells()]
        widths = [max(len(line[i]) for line in cells) for i in range(2)]
        lines += [f"  {name:<{widths[0]}}  {module:<{widths[1]}}  {text}" for name, module, text in cells]
        now, most = _mebibytes(self.packed_bytes), _mebibytes(self.packed_bytes_at_most)
        lines.append(f"packed weights: {now} now, at most {most}")
        return "\n".join(lines + self.notes)

    def _cells(self) -> list[tuple[str, str, str]]:
        """The rows as text; layers that differ in nothing but their number share a line."""
        lines: dict[tuple[str, str, str], list[str]] = {}
        for row in self.rows:
            text = f"{LEFT}: {row.reason}" if row.status == LEFT else self._note(row)
            pattern, numbers = _NUMBER.sub(".{}", row.name, count=1), _NUMBER.findall(row.name)
            lines.setdefault((pattern, row.module, text), []).append(numbers[0] if numbers else "")
        return [
            (pattern.replace("{}", _span(numbers)) or "(model)", module, text)
            for (pattern, module, text), numbers in lines.items()
        ]

    @staticmethod
    def _note(row: Row) -> str:
        return "; ".join(part for part in (row.uses, row.reason) if part)


_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


def _span(numbers: list[str]) -> str:
    """1, 2, 3, 5 as 1-3,5."""
    spans: list[list[int]] = []
    for number in (int(n) for n in numbers if n):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][-1:] = [number] if len(spans[-1]) > 1 else [spans[-1][0], number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
