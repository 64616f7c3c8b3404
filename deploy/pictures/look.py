"""Colours and numbers, as the pictures have them."""

from __future__ import annotations

from math import ceil, floor, log10

PAGE = "#f4f5f7"
CARD = "#ffffff"
EDGE = "#dfe2e8"
BAND = "#e6e8ee"
"""While something was done to the deployment."""
INK = "#1f2430"
FAINT = "#6b7280"
ERROR = "#c4314b"

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

SERVICES = {
    "frontend": "#2f6fde",
    "router": "#e0752d",
    "prefill_worker": "#b0489b",
    "decode_worker": "#2b9c5a",
}

_LINES = (
    *("#2f6fde", "#e0752d", "#2b9c5a", "#b0489b", "#c9a227", "#1f9aa8"),
    *("#c4314b", "#7a68d8", "#6d7f2e", "#8b5a1f", "#e58bb3", "#5f6b7a"),
)
_SUFFIXES = {"reqps": "req/s", "Bps": "B/s", "bytes": "B", "short": ""}
_STEPS = (1, 2, 2.5, 5, 10)
_BINARY_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TICKS = 4
"""Above zero, at most."""


def line(number: int) -> str:
    """The colour of a panel's series."""
    return _LINES[number % len(_LINES)]


def ticks(highest: float, unit: str) -> list[float]:
    """From zero to no less than the highest value, at numbers that read well in the unit."""
    if highest <= 0:
        return [0.0, 1.0]
    if unit == "bytes":
        scale = 1024.0 ** _magnitude(highest, 1024)
        steps = [scale * step for step in _BINARY_STEPS]
    else:
        scale = 10.0 ** floor(log10(highest / _TICKS))
        steps = [scale * step for step in _STEPS]
    step = next(step for step in steps if highest <= _TICKS * step)
    return [number * step for number in range(max(1, ceil(highest / step - 1e-9)) + 1)]


def with_unit(value: float, unit: str) -> str:
    """A number as Grafana's unit of that name writes it, shortly. Raises KeyError for a unit that
    no panel has."""
    if unit == "s":
        return seconds(value)
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    base, infix = (1024.0, "i") if unit == "bytes" else (1e3, "")
    magnitude = _magnitude(value, base)
    scale = ("", f"k{infix}", f"M{infix}", f"G{infix}", f"T{infix}")[magnitude].replace("ki", "Ki")
    return f"{value / base**magnitude:.4g} {scale}{_SUFFIXES[unit]}".strip()


def seconds(value: float) -> str:
    """A duration in the unit that reads best."""
    if abs(value) >= 1 or value == 0:
        return f"{value:.3g} s"
    if abs(value) >= 1e-3:
        return f"{value * 1e3:.3g} ms"
    return f"{value * 1e6:.3g} µs"


def _magnitude(value: float, base: float) -> int:
    magnitude = 0
    while abs(value) >= base ** (magnitude + 1):
        magnitude += 1
    return magnitude
