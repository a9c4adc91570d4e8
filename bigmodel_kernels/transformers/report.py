"""What `patch` did, or would do, module by module."""

from __future__ import annotations

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

    `packed_bytes` is what packed copies of the patched weights take in memory now; `packed_bytes_at_most` what they
    will take once every patched layer has run on a backend that packs. Both are 0 where the backend reads weights as
    they are.
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
            f"{len(self.left_alone)} left alone (transformers {self.transformers_version}, torch {self.torch_version})"
        ]
        cells = [("module", "class", "runs")] + [
            (
                row.name or "(model)",
                row.module,
                f"{LEFT}: {row.reason}" if row.status == LEFT else self._note(row),
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(2)]
        lines += [f"  {name:<{widths[0]}}  {module:<{widths[1]}}  {text}" for name, module, text in cells]
        lines.append(
            f"packed weights: {_mebibytes(self.packed_bytes)} now, at most {_mebibytes(self.packed_bytes_at_most)}"
        )
        return "\n".join(lines + self.notes)

    @staticmethod
    def _note(row: Row) -> str:
        return "; ".join(part for part in (row.uses, row.reason) if part)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
