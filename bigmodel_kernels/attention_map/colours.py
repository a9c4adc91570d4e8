"""The colour scale of all three pictures: viridis, which keeps its order for colour-blind readers and in grey
(Smith and van der Walt, 2015)."""

from __future__ import annotations

#: 17 colours at equal distances; what is between is mixed.
ANCHORS = (
    *((68, 1, 84), (72, 24, 106), (71, 45, 123), (66, 64, 134), (59, 82, 139), (51, 99, 141)),
    *((44, 114, 142), (38, 130, 142), (33, 145, 140), (31, 160, 136), (40, 174, 128), (63, 188, 115)),
    *((94, 201, 98), (132, 212, 75), (173, 220, 48), (216, 226, 25), (253, 231, 37)),
)

Colour = tuple[int, int, int]


def colour(share: float) -> Colour:
    """Of a number from 0 to 1."""
    place = min(1.0, max(0.0, share)) * (len(ANCHORS) - 1)
    low = min(int(place), len(ANCHORS) - 2)
    r, g, b = (
        round(a + (b - a) * (place - low)) for a, b in zip(ANCHORS[low], ANCHORS[low + 1], strict=True)
    )
    return r, g, b


def ink(background: Colour) -> str:
    """Black or white, whichever has the larger contrast (WCAG 2.2)."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def css(background: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*background)
