"""A benchmark document as tables."""

from __future__ import annotations

import itertools
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bigmodel_kernels.bench.machine import RUNTIMES
from bigmodel_kernels.bench.suite import OURS


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def show(document: dict[str, Any], console: Console) -> None:
    """Machine, calibration, one table for each suite, and the verdict."""
    machine, start = document["machine"], document["calibration"]["start"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['cores']} cores"
    console.print(
        f"{where}; {machine['threads']} threads, kernels {machine['isa'] or 'not built'}, "
        f"torch {machine['torch']} ({machine['torch_isa']}), "
        f"transformers {machine['transformers'] or 'not installed'}"
    )
    runtimes = {name: version for name, version in machine.get("runtimes", {}).items() if version}
    if document.get("peers") and runtimes:
        console.print(", ".join(f"{name} {version}" for name, version in runtimes.items()))
    peaks = ", ".join(f"{name} {value / 1e9:,.1f} GFLOP/s" for name, value in start["gemm_flops"].items())
    console.print(f"torch GEMM: {peaks}; copy {start['copy_bytes'] / 1e9:.1f} GB/s")
    for suite, rows in itertools.groupby(document["rows"], key=lambda row: row["suite"]):
        console.print((_peers if document.get("peers") else _suite)(suite, list(rows)))
    left_out = {
        f"{row['suite']} {name}: {why}" for row in document["rows"] for name, why in row["left_out"].items()
    }
    for row in document["rows"]:
        for name in row.get("disagree", ()):
            console.print(
                f"{row['suite']}, {row['case']} {row['dtype']}: {name} computes something else than "
                f"{row['peer']}, its time does not count",
                style="bold red",
                markup=False,
            )
    for line in sorted(left_out):
        console.print(f"left out: {line}", style="yellow", markup=False)
    trust = document["trust"]
    if trust["trusted"]:
        console.print(
            "The machine was steady from start to end: the numbers are to be trusted.", style="green"
        )
    else:
        console.print(
            "Do not trust these numbers: " + "; ".join(trust["reasons"]), style="bold red", markup=False
        )


def _peers(name: str, rows: list[dict[str, Any]]) -> Table:
    """Everybody's speed-up and part of the product's peak, over the time; ours is the last column."""
    peer = rows[0]["peer"]
    names = dict.fromkeys(name for row in rows for name in (*row["times"], *row["left_out"]))
    contenders = [name for name in names if name not in (*RUNTIMES, OURS)]  # torch's, other runtimes, ours
    contenders += [*RUNTIMES, OURS]
    table = Table(
        title=f"{name}: times as fast as {peer}, part of the GEMM peak; time",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        leading=1,
    )
    table.add_column("case")
    for contender in contenders:
        table.add_column(contender, justify="right")
    table.add_column("difference", justify="right")
    for row in rows:
        cells = [f"{row['case']}\n{row['dtype']}" + (" (noisy)" if row["noisy"] else "")]
        cells += [_against_peer(row, contender) for contender in contenders]
        # Of those whose time counts: the others say so in their own cells.
        counted = [d for n, d in row["differences"].items() if n not in row["disagree"]]
        cells.append(f"{max(counted):.1e}" if counted else "")
        table.add_row(*cells)
    return table


def _against_peer(row: dict[str, Any], name: str) -> str:
    timing = row["times"].get(name)
    if timing is None:
        return "left out" if name in row["left_out"] else "-"
    if name in row["disagree"]:
        difference = row["differences"].get(name)
        return "differs" + (f" by {difference:.1e}" if difference is not None else "") + f"\n{_time(timing)}"
    speedup = row["speedup"].get(name)
    first = f"{row['of_peak'][name]:.0%}"
    return (f"{speedup:.2f}  " if speedup is not None else "") + f"{first}\n{_time(timing)}"


def _suite(name: str, rows: list[dict[str, Any]]) -> Table:
    contenders = list(dict.fromkeys(name for row in rows for name in row["times"]))
    unit = next((row["unit"] for row in rows if row["unit"]), None)
    with_memory = any("peak_bytes" in row for row in rows)
    table = Table(
        title=name, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    table.add_column("case")
    table.add_column("dtype")
    for contender in contenders:
        table.add_column(contender, justify="right")
    table.add_column("speed-up", justify="right")
    table.add_column("x floor", justify="right")
    if unit:
        table.add_column(f"{unit}/s", justify="right")
    table.add_column("difference", justify="right")
    if with_memory:
        table.add_column("peak memory", justify="right")
    for row in rows:
        cells = [row["case"] + (" (noisy)" if row["noisy"] else ""), row["dtype"]]
        cells += [_time(row["times"].get(contender)) for contender in contenders]
        speedup = row["speedup"].get(OURS)
        cells.append("" if speedup is None else f"{speedup:.2f} ({row['peer']})")
        cells.append(f"{row['to_floor'][OURS]:.2f} ({row['floor_by']})")
        if unit:
            cells.append(f"{row['throughput'][OURS]:,.0f}" if row["throughput"] else "")
        difference = row["max_difference"]
        cells.append("" if difference is None else f"{difference:.1e}")
        if OURS in row.get("disagree", ()):
            cells[-1] += " (too large)"
        if with_memory:
            cells.append(_memory(row))
        table.add_row(*cells)
    return table


def _memory(row: dict[str, Any]) -> str:
    """Ours, and the others'."""
    peaks = {name: f"{size / 2**20:,.0f}" for name, size in row.get("peak_bytes", {}).items()}
    ours = peaks.pop(OURS, None)
    if ours is None:
        return ""
    return f"{ours} MiB ({', '.join(f'{name} {size}' for name, size in peaks.items())})"


def _time(timing: dict[str, Any] | None) -> str:
    if timing is None:
        return "-"
    return seconds(timing["median_s"]) + (" (once)" if timing["samples"] == 1 else "")
