"""How much room texts take, as matplotlib sets them."""

from __future__ import annotations

from functools import cache

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

_POINTS_PER_INCH = 72


@cache
def width(text: str, size: float) -> float:
    """Of a text in letters of that size in points, in inches."""
    points: float
    points, _, _ = TextToPath().get_text_width_height_descent(
        text, FontProperties(size=size), ismath=False
    )
    return points / _POINTS_PER_INCH


def shortened(text: str, size: float, room: float) -> str:
    """As much of the text as so many inches hold."""
    if width(text, size) <= room:
        return text
    while text and width(text + "…", size) > room:
        text = text.rpartition(" ")[0]
    return text + "…"
