"""A dashboard as a picture: its panels in its own grid."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deploy.pictures import letters, look
from deploy.pictures.recording import Dashboard, Panel, Series, Watched

# All lengths are in inches.
_WIDTH = 14.0
_MARGIN = 0.16
_GAP = 0.05
_COLUMNS = 24
"""Of Grafana's grid."""
_GRID_HEIGHT = 0.31
"""Of a unit of the grid."""
_HEAD = 0.54
"""Of a panel: title and description."""
_LEFT, _RIGHT, _TICKS = 0.78, 0.16, 0.24
_LEGEND_LINE, _LEGEND_LINES = 0.165, 4
"""What does not fit into so many lines is counted."""
_HEADROOM = 1.03
"""So that a line at the highest tick is seen whole."""
_SWATCH, _LEGEND_GAP = 0.17, 0.16

_Lines = list[list[tuple[float, int | None, str]]]
"""Entries that stand side by side: where each begins, its number, and its text."""


def figure(board: Dashboard, watched: Watched) -> Figure:
    """Title, what happened in the run, and all panels."""
    events = _event_lines(watched)
    top = 0.9 + 0.22 * len(events)
    units = max(panel.y + panel.height for panel in board.panels)
    size = (_WIDTH, top + units * _GRID_HEIGHT + _MARGIN)
    drawn = _Drawn(Figure(size, facecolor=look.PAGE), top, watched)
    drawn.write(_MARGIN, 0.33, board.title, size=15, weight="bold")
    about = f"{board.description} {watched.deployment}."
    drawn.write(_MARGIN, 0.58, about, size=9, color=look.FAINT)
    drawn.events(0.88, events)
    for panel in board.panels:
        match panel.type:
            case "row":
                drawn.row(panel)
            case "text":
                drawn.text(panel)
            case _:
                drawn.graph(panel)
    return drawn.figure


class _Drawn:
    """A figure that is measured in inches from its upper left corner."""

    def __init__(self, figure: Figure, top: float, watched: Watched) -> None:
        self.figure = figure
        self._top = top
        self._watched = watched
        self._width, self._height = figure.get_size_inches()
        self._column = (self._width - 2 * _MARGIN) / _COLUMNS

    def write(self, x: float, y: float, text: str, **style: object) -> None:
        """`y` is where the letters stand."""
        style = {"color": look.INK, "va": "baseline", **style}
        self.figure.text(x / self._width, 1 - y / self._height, text, **style)

    def events(self, y: float, lines: _Lines) -> None:
        """What the letters at the grey bands stand for."""
        for number, line in enumerate(lines):
            at_y = y + 0.22 * number
            for x, event, text in line:
                self._box(_MARGIN + x, at_y - 0.135, 0.18, 0.18, look.BAND)
                letter = look.LETTERS[event or 0]
                self.write(_MARGIN + x + 0.09, at_y, letter, size=8.5, weight="bold", ha="center")
                self.write(_MARGIN + x + 0.25, at_y, text, size=8.5)

    def row(self, panel: Panel) -> None:
        x, y, _, height = self._place(panel)
        self.write(x + 0.05, y + height - 0.08, panel.title, size=10.5, weight="bold")

    def text(self, panel: Panel) -> None:
        x, y, width, _ = self._card(panel)
        self.write(x + 0.12, y + 0.24, panel.title, size=9.5, weight="bold")
        plain = panel.text.replace("`", "")
        for number, line in enumerate(textwrap.wrap(plain, int((width - 0.3) / 0.072))):
            self.write(x + 0.12, y + 0.48 + 0.2 * number, line, size=9)

    def graph(self, panel: Panel) -> None:
        x, y, width, height = self._card(panel)
        self.write(x + 0.12, y + 0.22, panel.title, size=9.5, weight="bold")
        about = letters.shortened(panel.description, 7.5, width - 0.24)
        self.write(x + 0.12, y + 0.38, about, size=7.5, color=look.FAINT)
        legend = _legend([series.legend for series in panel.series], width - 0.24)
        legend_height = 0.1 + len(legend) * _LEGEND_LINE
        axes_height = height - _HEAD - legend_height - _TICKS
        axes = self.figure.add_axes(
            (
                (x + _LEFT) / self._width,
                1 - (y + _HEAD + axes_height) / self._height,
                (width - _LEFT - _RIGHT) / self._width,
                axes_height / self._height,
            )
        )
        self._bands(axes)
        self._lines(axes, panel)
        for line, entries in enumerate(legend):
            at_y = y + height - legend_height + 0.1 + line * _LEGEND_LINE
            for at_x, number, text in entries:
                if number is not None:
                    self._box(x + 0.12 + at_x, at_y - 0.055, 0.12, 0.025, look.line(number))
                self.write(x + 0.12 + at_x + _SWATCH, at_y, text, size=7.5)

    def _bands(self, axes: Axes) -> None:
        begin, end = self._watched.began_at_seconds, self._watched.ended_at_seconds
        least_minutes = (end - begin) / 60 / 250
        for letter, event in zip(look.LETTERS, self._watched.events, strict=False):
            left = (event.began_at_seconds - begin) / 60
            right = max((event.ended_at_seconds - begin) / 60, left + least_minutes)
            axes.axvspan(left, right, color=look.BAND, lw=0, zorder=0)
            axes.text(
                (left + right) / 2,
                1.01,
                letter,
                transform=axes.get_xaxis_transform(),
                size=6.5,
                color=look.FAINT,
                ha="center",
                va="bottom",
            )

    def _lines(self, axes: Axes, panel: Panel) -> None:
        begin, end = self._watched.began_at_seconds, self._watched.ended_at_seconds
        for number, series in enumerate(panel.series):
            colour = look.line(number)
            for run in _unbroken(series, self._watched.step_seconds):
                minutes = [(at - begin) / 60 for at, _ in run]
                values = [value for _, value in run]
                # One value alone makes no line.
                marker = "." if len(run) == 1 else ""
                axes.plot(minutes, values, marker=marker, color=colour, lw=1.2, ms=3, zorder=3)
                axes.fill_between(minutes, values, color=colour, alpha=0.06, lw=0, zorder=2)
        if not any(series.points for series in panel.series):
            axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=look.FAINT)
        axes.set_xlim(0, (end - begin) / 60)
        highest = max((value for series in panel.series for _, value in series.points), default=0)
        ticks = look.ticks(highest, panel.unit)
        axes.set_yticks(ticks, [look.with_unit(tick, panel.unit) for tick in ticks])
        axes.set_ylim(0, _HEADROOM * ticks[-1])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:g} min" if value else "")
        )
        axes.tick_params(labelsize=7, colors=look.FAINT, length=0, pad=3)
        axes.grid(color=look.EDGE, lw=0.5, zorder=1)
        axes.set_axisbelow(True)
        axes.set_facecolor(look.CARD)
        axes.spines[:].set_visible(False)

    def _place(self, panel: Panel) -> tuple[float, float, float, float]:
        """Left, top, width and height."""
        return (
            _MARGIN + panel.x * self._column,
            self._top + panel.y * _GRID_HEIGHT,
            panel.width * self._column,
            panel.height * _GRID_HEIGHT,
        )

    def _card(self, panel: Panel) -> tuple[float, float, float, float]:
        """Draws the panel's ground, and gives its place."""
        x, y, width, height = self._place(panel)
        place = (x + _GAP, y + _GAP, width - 2 * _GAP, height - 2 * _GAP)
        self._box(*place, look.CARD, edgecolor=look.EDGE, lw=0.8, zorder=-1)
        return place

    def _box(
        self, x: float, y: float, width: float, height: float, colour: str, **style: object
    ) -> None:
        corner = (x / self._width, 1 - (y + height) / self._height)
        style = {"lw": 0, **style}
        self.figure.add_artist(
            Rectangle(corner, width / self._width, height / self._height, facecolor=colour, **style)
        )


def _flowing(texts: Sequence[str], size: float, lead: float, gap: float, width: float) -> _Lines:
    """`lead` is for what stands before each text, `gap` for what is after it."""
    lines: _Lines = []
    x = 0.0
    for number, text in enumerate(texts):
        needed = lead + letters.width(text, size)
        if not lines or x + needed > width:
            lines.append([])
            x = 0.0
        lines[-1].append((x, number, text))
        x += needed + gap
    return lines


def _legend(texts: Sequence[str], width: float) -> _Lines:
    """Entries without a number say how many are left out."""
    lines = _flowing(texts, 7.5, _SWATCH, _LEGEND_GAP, width)
    if len(lines) > _LEGEND_LINES:
        lines = lines[:_LEGEND_LINES]
        x, number, _ = lines[-1].pop()
        lines[-1].append((x, None, f"and {len(texts) - (number or 0)} more"))
    return lines


def _event_lines(watched: Watched) -> _Lines:
    texts = []
    for event in watched.events:
        began = _clock(event.began_at_seconds - watched.began_at_seconds)
        ended = _clock(event.ended_at_seconds - watched.began_at_seconds)
        texts.append(
            f"{began}–{ended}  {event.text}" if ended != began else f"{began}  {event.text}"
        )
    return _flowing(texts, 8.5, 0.25, 0.3, _WIDTH - 2 * _MARGIN)


def _unbroken(series: Series, step_seconds: float) -> list[list[tuple[float, float]]]:
    """The series in runs of points that follow each other."""
    runs: list[list[tuple[float, float]]] = []
    for point in series.points:
        if not runs or point[0] - runs[-1][-1][0] > 1.5 * step_seconds:
            runs.append([])
        runs[-1].append(point)
    return runs


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
