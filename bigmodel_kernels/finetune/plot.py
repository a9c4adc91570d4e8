"""The learning curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigmodel_kernels.extras import package

#: Metrics in parts of 1.
_PARTS = ("f1", "accuracy", "rougeL")


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """An exponential mean that starts without a bias (Adam's correction, arXiv:1412.6980)."""
    mean, result = 0.0, []
    for i, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**i))
    return result


def curve(log: Sequence[dict[str, Any]], metric: str, path: Path, title: str) -> None:
    """Training and held-out loss over steps, with the task's score on an axis of its own."""
    package("matplotlib", "matplotlib", "finetune")
    from matplotlib.figure import Figure

    steps = [r for r in log if r["kind"] == "step"]
    evaluations = [r for r in log if r["kind"] == "evaluation"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    at = [r["step"] for r in steps]
    losses = [r["loss"] for r in steps]
    axes.plot(at, losses, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(at, smoothed(losses), color="C0", label="training loss")
    axes.plot(
        [r["step"] for r in evaluations],
        [r["loss"] for r in evaluations],
        "o-",
        color="C1",
        label="held-out loss",
    )
    axes.set(xlabel="step", ylabel="loss", title=title)
    other = axes.twinx()
    other.plot(
        [r["step"] for r in evaluations], [r[metric] for r in evaluations], "s--", color="C2", label=metric
    )
    other.set_ylabel(metric)
    if metric in _PARTS:
        other.set_ylim(0, 1)
    lines = [*axes.get_lines()[1:], *other.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="best")
    figure.savefig(path, dpi=120)
