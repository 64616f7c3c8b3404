"""When clients that get no outputs hear of the load, when time passes as the test says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from operator import itemgetter

import pytest

from libs.engine.interface import EngineLoad
from libs.worker.core.session import Session
from libs.worker.load_spreading import (
    ANY_WITHIN_SECONDS,
    MUCH_WITHIN_SECONDS,
    LoadSpreading,
)

IDLE = EngineLoad(0, 0, 0, 0, 1000)
BUSY = EngineLoad(1, 0, 0, 0, 1000)
SLIGHTLY_OTHER = EngineLoad(0, 0, 0, 1, 1000)


class ManualTimers:
    """They go off when the test says that time has passed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay: float, callback: Callable[[], None], /) -> None:
        self.due.append((self.now + delay, callback))

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while timer := min((t for t in self.due if t[0] <= end), key=itemgetter(0), default=None):
            self.due.remove(timer)
            self.now, callback = timer
            callback()
        self.now = end


class Bench:
    """One client that reads at once, and when it heard what."""

    def __init__(self) -> None:
        self.timers = ManualTimers()
        self.load = IDLE
        self.heard: list[tuple[float, EngineLoad]] = []
        self.session = Session(self._take, 1_000)
        self.spreading = LoadSpreading({self.session}, lambda: self.load, self.timers)
        self.session.flush()
        self.heard.clear()

    def _take(self) -> None:
        if self.session.take(lambda: self.load) is not None:
            self.heard.append((self.timers.now, self.load))
            self.session.command(self.session.taken_sequence_number + 1, 0)

    def change(self, load: EngineLoad) -> None:
        self.load = load
        self.spreading.changed()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_change_that_matters_is_told_soon_with_what_followed_it(bench: Bench) -> None:
    bench.change(EngineLoad(0, 1, 40, 0, 1000))
    bench.timers.pass_time(MUCH_WITHIN_SECONDS / 2)
    bench.change(BUSY)
    bench.timers.pass_time(MUCH_WITHIN_SECONDS / 2)
    assert bench.heard == [(MUCH_WITHIN_SECONDS, BUSY)]


def test_changes_without_end_are_told_once_in_an_interval(bench: Bench) -> None:
    intervals, changes = 10, 7
    for _ in range(intervals * changes):
        bench.change(BUSY if bench.load == IDLE else IDLE)
        bench.timers.pass_time(MUCH_WITHIN_SECONDS / changes)
    heard_at = [at for at, _ in bench.heard]
    gaps = [later - earlier for earlier, later in pairwise(heard_at)]
    assert 2 <= len(heard_at) <= intervals
    assert min(gaps) >= MUCH_WITHIN_SECONDS - 1e-9


def test_a_slight_change_is_told_later(bench: Bench) -> None:
    bench.change(SLIGHTLY_OTHER)
    bench.timers.pass_time(MUCH_WITHIN_SECONDS)
    assert not bench.heard
    bench.timers.pass_time(ANY_WITHIN_SECONDS)
    assert [load for _, load in bench.heard] == [SLIGHTLY_OTHER]


@pytest.mark.parametrize("load", [IDLE, BUSY, SLIGHTLY_OTHER])
def test_nothing_runs_once_all_is_told(bench: Bench, load: EngineLoad) -> None:
    bench.change(load)
    bench.timers.pass_time(2 * ANY_WITHIN_SECONDS)
    assert not bench.timers.due
