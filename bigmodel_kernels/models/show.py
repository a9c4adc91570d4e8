"""The table of families and checks in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bigmodel_kernels.models.table import FAILED, LEFT, OK, Cell, FamilyRow

_STYLES = {OK: "green", LEFT: "yellow", FAILED: "bold red"}


def show(rows: list[FamilyRow], console: Console) -> None:
    """A line for each family; under the table what failed, and what was left alone on purpose."""
    table = Table(
        title="Patched models against transformers' (a number is the largest error, as a part of the limit)",
        title_justify="left",
    )
    for column in ("family", "modules", "operators", *(rows[0].cells if rows else ())):
        table.add_column(column)
    for row in rows:
        cells = (f"[{_STYLES[cell.status]}]{_text(cell)}[/]" for cell in row.cells.values())
        table.add_row(row.family, str(sum(row.modules.values())), str(len(row.ops)), *cells)
    console.print(table)
    for status in (LEFT, FAILED):
        for text, families in _by_text(rows, status).items():
            console.print(f"{status}: {', '.join(families)}: {text}", style=_STYLES[status], markup=False)
    cells_of_all = [cell for row in rows for cell in row.cells.values()]
    counts = [f"{sum(cell.status == status for cell in cells_of_all)} {status}" for status in _STYLES]
    failed = any(cell.status == FAILED for cell in cells_of_all)
    console.print(", ".join(counts), style="bold red" if failed else "green")


def _text(cell: Cell) -> str:
    if cell.status == LEFT:
        return "-"
    return cell.status if cell.part is None else f"{cell.status} {cell.part:.2f}"


def _by_text(rows: list[FamilyRow], status: str) -> dict[str, list[str]]:
    """Families by what is said of their cells of this status, so that each reason is there once."""
    found: dict[str, list[str]] = {}
    for row in rows:
        checks: dict[str, list[str]] = {}
        for check, cell in row.cells.items():
            if cell.status == status:
                checks.setdefault(cell.detail, []).append(check)
        for detail, names in checks.items():
            found.setdefault(f"{', '.join(names)}: {detail}", []).append(row.family)
    return found
