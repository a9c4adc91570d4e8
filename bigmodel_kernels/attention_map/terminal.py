"""An attention map as a table of coloured percentages."""

from __future__ import annotations

import math

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bigmodel_kernels.attention_map.colours import colour, css, ink
from bigmodel_kernels.attention_map.compute import AttentionMap

#: Columns of a cell with its padding.
_CELL = 4
_LABEL = 14


def show(found: AttentionMap, console: Console) -> None:
    """One head, or the mean of several: rows look, columns are looked at; as many as the terminal is wide."""
    weights = found.mean()
    largest = max(float(weights.max()), 1e-9)
    size = len(found.tokens)
    fitting = max(1, min(size, (console.width - _LABEL - 10) // _CELL))
    console.print(
        f"Attention of {found.model}, {found.title()}, in percent: a row looks at the columns",
        markup=False,
        highlight=False,
    )
    table = Table(box=None, padding=0, pad_edge=False)
    table.add_column("", no_wrap=True)
    for j in range(fitting):
        table.add_column(
            Text(_short(found.tokens[j], _CELL - 1)), justify="center", no_wrap=True, width=_CELL
        )
    table.add_column(" entropy", justify="right", no_wrap=True)
    for i, token in enumerate(found.tokens):
        cells = [_cell(float(weights[i, j]), largest) for j in range(fitting)]
        entropy = float(torch.special.entr(found.weights[:, :, i]).sum(-1).mean())
        table.add_row(Text(f"{_short(token, _LABEL)} "), *cells, f"{entropy:.2f}")
    console.print(table)
    if fitting < size:
        console.print(
            f"The last {size - fitting} of {size} tokens looked at do not fit here.", style="yellow"
        )


def _cell(weight: float, largest: float) -> Text:
    background = colour(math.sqrt(weight / largest))
    percent = f"{round(100 * weight):>3} "
    return Text(percent, style=f"{ink(background)} on {css(background)}")


def _short(token: str, width: int) -> str:
    """Cut to the width that it takes in a terminal, where Chinese characters take two columns."""
    text = Text(token)
    text.truncate(width, overflow="ellipsis")
    return text.plain
