"""A trace as a picture: its spans in the order of beginning, each below the one that caused it."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deploy.pictures import letters, look
from deploy.pictures.recording import Trace, TraceSpan

# All lengths are in inches.
_WIDTH = 14.0
_ROW = 0.34
_TOP, _BOTTOM, _RIGHT = 1.05, 0.14, 0.18
_NAMES = 4.6
"""Width of the column on the left."""
_INDENT = 0.22
_LABEL_GAP = 0.07
_SHOWN = {
    "gen_ai.usage.input_tokens": "{} prompt tokens",
    "gen_ai.usage.cache_read.input_tokens": "{} cached",
    "switchgear.transferred_tokens": "{} transferred",
    "gen_ai.usage.output_tokens": "{} output tokens",
    "gen_ai.response.time_to_first_chunk": "first token after {:.3f} s",
    "switchgear.handover": "handover: {}",
    "switchgear.predicted_cached_tokens": "{} predicted cached",
}
"""Attributes that are written beside their span."""


def figure(trace: Trace) -> Figure:
    """Name and process on the left, when and how long on the right."""
    spans = list(trace.in_tree())
    begin = min(span.began_at_ns for _, span in spans)
    whole_seconds = (max(span.ended_at_ns for _, span in spans) - begin) / 1e9
    height = _TOP + len(spans) * _ROW + _BOTTOM
    drawn = Figure((_WIDTH, height), facecolor=look.CARD)
    title = f"Trace {trace.trace_id}"
    drawn.text(0.012, 1 - 0.33 / height, title, size=14, weight="bold", color=look.INK)
    processes = len({span.instance for _, span in spans})
    about = (
        f"{look.seconds(whole_seconds)}, {len(spans)} spans from {processes} processes. "
        f"{trace.deployment}."
    )
    drawn.text(0.012, 1 - 0.58 / height, about, size=9, color=look.FAINT)

    def column(left: float, width: float) -> Axes:
        """Both have a row for each span."""
        rows = len(spans) * _ROW
        axes = drawn.add_axes((left / _WIDTH, _BOTTOM / height, width / _WIDTH, rows / height))
        axes.set_ylim(len(spans), 0)
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        for row in range(0, len(spans), 2):
            axes.axhspan(row, row + 1, color=look.PAGE, lw=0, zorder=-2)
        return axes

    names = column(0, _NAMES)
    names.set_xlim(0, _NAMES)
    names.set_xticks([])
    times = column(_NAMES, _WIDTH - _NAMES - _RIGHT)
    times.set_xlim(0, whole_seconds)
    times.xaxis.tick_top()
    times.xaxis.set_major_locator(MaxNLocator(8))
    times.xaxis.set_major_formatter(FuncFormatter(lambda value, _: look.seconds(value)))
    times.tick_params(labelsize=8, colors=look.FAINT, length=0)
    times.grid(axis="x", color=look.EDGE, lw=0.6)
    times.set_axisbelow(True)
    for row, (depth, span) in enumerate(spans):
        _name(names, row, depth, span)
        _bar(times, row, span, begin, whole_seconds)
    return drawn


def _colour(span: TraceSpan) -> str:
    return look.ERROR if span.is_error else look.SERVICES[span.service]


def _name(axes: Axes, row: int, depth: int, span: TraceSpan) -> None:
    x = 0.17 + depth * _INDENT
    middle = row + 0.5
    axes.plot([x, x], [row + 0.18, row + 0.82], color=_colour(span), lw=3, solid_capstyle="butt")
    axes.text(x + 0.09, middle, span.name, size=9.5, weight="bold", color=look.INK, va="center")
    axes.text(
        _NAMES - 0.12, middle, span.instance, size=8.5, color=look.FAINT, va="center", ha="right"
    )


def _bar(axes: Axes, row: int, span: TraceSpan, begin: int, whole_seconds: float) -> None:
    """What took how long, and beside it what the span says of tokens."""
    left, right = (span.began_at_ns - begin) / 1e9, (span.ended_at_ns - begin) / 1e9
    shortest = whole_seconds / 500  # So that it is still seen.
    length = max(right - left, shortest)
    axes.barh(row + 0.5, length, left=left, height=0.52, color=_colour(span))
    facts = [
        form.format(span.attributes[key]) for key, form in _SHOWN.items() if key in span.attributes
    ]
    text = "    ".join([look.seconds(right - left), *facts])
    inch = whole_seconds / (_WIDTH - _NAMES - _RIGHT)
    needed = (letters.width(text, 8.5) + 2 * _LABEL_GAP) * inch
    if left + length + needed <= whole_seconds:
        x, colour, side = left + length + _LABEL_GAP * inch, look.INK, "left"
    elif needed <= length:
        x, colour, side = left + _LABEL_GAP * inch, "white", "left"
    else:
        x, colour, side = left - _LABEL_GAP * inch, look.INK, "right"
    axes.text(x, row + 0.5, text, size=8.5, va="center", color=colour, ha=side)
