"""An attention map as one HTML file that needs nothing else: no network, no server.

The page is `page.html`. What is written here shows one head without JavaScript too; with it, every head, by
keyboard and by pointer. Whatever comes from the text is escaped, in the markup and in the data.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from bigmodel_kernels.attention_map.colours import ANCHORS, colour, css, ink
from bigmodel_kernels.attention_map.compute import AttentionMap

_escape = html.escape


def write(found: AttentionMap, path: Path) -> None:
    """Writes the page, and makes the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(found), encoding="utf-8")


def render(found: AttentionMap) -> str:
    """The page as text."""
    size, heads = len(found.tokens), len(found.heads)
    cell = max(8, min(40, 640 // max(1, size)))
    parts = {
        "title": _escape(f"What {found.model} looks at"),
        "facts": _facts(found),
        "cell": str(cell),
        "gap": "2" if size <= 24 else "1" if size <= 48 else "0",
        "heads": str(heads),
        "smallest": "44" if heads <= 16 else "28",
        "gradient": ", ".join(css(anchor) for anchor in ANCHORS),
        "most_entropy": f"{math.log(size):.2f}",
        "sentence": "".join(f"<li>{_escape(token)}</li>" for token in found.tokens),
        "head_names": "".join(
            f'<th scope="col">{"head " * (heads <= 16)}{head}</th>' for head in found.heads
        ),
        "heads_hidden": " hidden" if len(found.layers) == heads == 1 else "",
        "head_rows": _head_rows(found),
        "map_title": _map_title(found, 0, 0),
        "map_class": "" if cell >= 26 else "dense",
        "key_names": "".join(
            f'<th scope="col" title="{_escape(token)}"><span>{_escape(token)}</span></th>'
            for token in found.tokens
        ),
        "map_rows": _map_rows(found),
        "data": _data(found),
    }
    template = resources.files("bigmodel_kernels.attention_map").joinpath("page.html").read_text("utf-8")
    # In one pass: what a text puts into the page is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def _facts(found: AttentionMap) -> str:
    shown = f"{len(found.tokens)} tokens"
    if found.whole > len(found.tokens):
        shown = f"The first {len(found.tokens)} of {found.whole} tokens"
    layers, heads = len(found.layers), len(found.heads)
    return (
        f"{shown}, {layers} layer{'s' * (layers > 1)} of {heads} head{'s' * (heads > 1)}. "
        "The tokens have the colours of the row that is pointed at."
    )


def _map_title(found: AttentionMap, layer: int, head: int) -> str:
    return (
        f"Layer {found.layers[layer]}, head {found.heads[head]}, "
        f"mean entropy {found.entropy[layer, head]:.2f} nats"
    )


def _head_rows(found: AttentionMap) -> str:
    size = len(found.tokens)
    rows = []
    for i, layer in enumerate(found.layers):
        cells = []
        for j, head in enumerate(found.heads):
            first = i == j == 0
            entropy = f"{found.entropy[i, j]:.2f}"
            cells.append(
                f'<td role="gridcell" tabindex="{0 if first else -1}" aria-selected="{str(first).lower()}" '
                f'aria-label="Layer {layer}, head {head}, mean entropy {entropy} nats">'
                f'<canvas width="{size}" height="{size}" aria-hidden="true"></canvas>{entropy}</td>'
            )
        rows.append(f'<tr><th scope="row">layer {layer}</th>{"".join(cells)}</tr>')
    return "\n".join(rows)


def _map_rows(found: AttentionMap) -> str:
    weights, known = found.weights[0, 0], names(found.tokens)
    largest = max(float(weights.max()), 1e-9)
    rows = []
    for i, query in enumerate(found.tokens):
        cells = []
        for j in range(len(found.tokens)):
            weight = float(weights[i, j])
            background = colour(math.sqrt(weight / largest))
            cells.append(
                f'<td role="gridcell" tabindex="{0 if i == j == 0 else -1}" '
                f'aria-label="{_escape(known[i])} to {_escape(known[j])}: {weight:.3f}" '
                f'style="background-color:{css(background)};color:{ink(background)}">'
                f"{round(100 * weight)}</td>"
            )
        rows.append(
            f'<tr><th scope="row" title="{_escape(query)}">{_escape(query)}</th>{"".join(cells)}</tr>'
        )
    return "\n".join(rows)


def names(tokens: Sequence[str]) -> list[str]:
    """Tokens as they are called in sentences: one that comes again has its place behind it, from 1."""
    counts = Counter(tokens)
    return [f"{token} ({i})" if counts[token] > 1 else token for i, token in enumerate(tokens, 1)]


def _data(found: AttentionMap) -> str:
    """JSON that cannot end the script element that it stands in."""
    shades = [colour(i / 255) for i in range(256)]
    parts = (found.weights.double() * 65535).round().clamp(0, 65535).numpy().astype("<u2")
    value = {
        "tokens": found.tokens,
        "names": names(found.tokens),
        "layers": found.layers,
        "heads": found.heads,
        "entropy": found.entropy.tolist(),
        "weights": base64.b64encode(parts.tobytes()).decode("ascii"),
        "palette": [css(shade) for shade in shades],
        "darkFrom": next(i for i, shade in enumerate(shades) if ink(shade) == "#000000"),
    }
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")
