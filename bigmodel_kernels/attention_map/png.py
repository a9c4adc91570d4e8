"""An attention map as a picture: a small one for each head, or one large one with the tokens' names."""

from __future__ import annotations

import unicodedata
import warnings
from pathlib import Path
from typing import Any

from bigmodel_kernels.attention_map.compute import EXTRA, AttentionMap
from bigmodel_kernels.extras import package

#: Fonts with Chinese, Japanese and Korean characters; matplotlib's own has none.
_WIDE_FONTS = (
    *(
        "Noto Sans CJK SC",
        "Noto Sans CJK JP",
        "Source Han Sans SC",
        "WenQuanYi Micro Hei",
        "WenQuanYi Zen Hei",
    ),
    *(
        "PingFang SC",
        "Hiragino Sans GB",
        "Microsoft YaHei",
        "SimHei",
        "Arial Unicode MS",
        "Droid Sans Fallback",
    ),
)
_WIDE_FILES = (
    "notosanscjk",
    "sourcehansans",
    "wqy",
    "pingfang",
    "hiragino",
    "msyh",
    "simhei",
    "droidsansfallback",
)
#: The square root shows small weights next to those that take nearly all.
_SCALE = "weight, by its square root"


def write(found: AttentionMap, path: Path) -> str | None:
    """Writes the picture. Returns what is wrong with it: None, or that there is no font for some tokens.

    Raises MissingPackage without matplotlib.
    """
    package("matplotlib", "matplotlib", EXTRA)
    import matplotlib

    font, problem = _font(found.tokens)
    with matplotlib.rc_context({"font.family": font}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # it is said once, below
        figure = _one(found) if len(found.layers) == len(found.heads) == 1 else _all(found)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return problem


def _font(tokens: tuple[str, ...]) -> tuple[list[str], str | None]:
    from matplotlib import font_manager

    if not any(unicodedata.east_asian_width(c) in "WF" for token in tokens for c in token):
        return ["DejaVu Sans"], None
    for file in font_manager.findSystemFonts():  # matplotlib's list of them may be old
        if Path(file).stem.lower().startswith(_WIDE_FILES):
            font_manager.fontManager.addfont(file)
    installed = {font.name for font in font_manager.fontManager.ttflist}
    wide = [name for name in _WIDE_FONTS if name in installed]
    if wide:
        return ["DejaVu Sans", *wide[:1]], None
    return ["DejaVu Sans"], "no font with Chinese characters is installed: they are boxes in the picture"


def _one(found: AttentionMap) -> Any:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    size = len(found.tokens)
    side = min(14.0, max(4.5, 0.34 * size + 2))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    weights = found.weights[0, 0].numpy()
    image = axes.imshow(weights, cmap="viridis", norm=PowerNorm(0.5, vmin=0, vmax=weights.max()))
    small = 9 if size <= 32 else 6
    names = [token.replace("$", r"\$") for token in found.tokens]  # matplotlib takes $ for mathematics
    axes.set_xticks(range(size), names, rotation=90, fontsize=small)
    axes.set_yticks(range(size), names, fontsize=small)
    axes.tick_params(length=0)
    axes.set(xlabel="key: the token looked at", ylabel="query: the token that looks")
    axes.set_title(f"{found.model}, {found.title()}, entropy {found.entropy[0, 0]:.2f} nats", fontsize=11)
    figure.colorbar(image, shrink=0.7, label=_SCALE)
    return figure


def _all(found: AttentionMap) -> Any:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    rows, columns = len(found.layers), len(found.heads)
    figure = Figure(figsize=(1.05 * columns + 1.2, 1.2 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    image, norm = None, PowerNorm(0.5, vmin=0, vmax=1)
    for row in range(rows):
        for column in range(columns):
            axes = grid[row, column]
            image = axes.imshow(found.weights[row, column].numpy(), cmap="viridis", norm=norm)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(f"{found.entropy[row, column]:.2f}", fontsize=7, labelpad=2)
            if row == 0:
                axes.set_title(f"head {found.heads[column]}", fontsize=8)
            if column == 0:
                axes.set_ylabel(f"layer {found.layers[row]}", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=grid, shrink=0.6, aspect=30, label=_SCALE)
    figure.suptitle(f"{found.model}: rows look at columns; under each head its entropy in nats", fontsize=10)
    return figure
