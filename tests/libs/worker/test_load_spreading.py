"""When clients that get no outputs hear of the load, when time passes as the test says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from operator import itemgetter

import pytest

from libs.engine.interface import EngineLoad
from libs.worker.core.session import Session
from libs.worker.load_spreading import (
    LOAD_INTERVAL_SECONDS,
    SETTLE_SECONDS,
    SLIGHT_LOAD_INTERVAL_SECONDS,
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

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None], /) -> None:
        self.due.append((when, callback))

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


def test_a_change_that_matters_is_told_as_soon_as_what_comes_with_it_is_there(bench: Bench) -> None:
    bench.change(EngineLoad(0, 1, 40, 0, 1000))
    bench.change(BUSY)
    bench.timers.pass_time(SETTLE_SECONDS)
    assert bench.heard == [(SETTLE_SECONDS, BUSY)]


def test_changes_without_end_are_told_once_in_an_interval(bench: Bench) -> None:
    looks = 10
    ends_at = bench.timers.now + SETTLE_SECONDS + (looks - 0.5) * LOAD_INTERVAL_SECONDS
    while bench.timers.now < ends_at:
        bench.change(BUSY if bench.load == IDLE else IDLE)
        bench.timers.pass_time(LOAD_INTERVAL_SECONDS / 7)
    heard_at = [at for at, _ in bench.heard]
    gaps = [later - earlier for earlier, later in pairwise(heard_at)]
    assert len(heard_at) <= looks
    assert min(gaps) >= LOAD_INTERVAL_SECONDS - 1e-9


def test_a_slight_change_is_told_later(bench: Bench) -> None:
    bench.change(SLIGHTLY_OTHER)
    bench.timers.pass_time(SETTLE_SECONDS)
    assert not bench.heard
    bench.timers.pass_time(SLIGHT_LOAD_INTERVAL_SECONDS)
    assert [load for _, load in bench.heard] == [SLIGHTLY_OTHER]


@pytest.mark.parametrize("load", [IDLE, BUSY, SLIGHTLY_OTHER])
def test_nothing_runs_once_all_is_told(bench: Bench, load: EngineLoad) -> None:
    bench.change(load)
    bench.timers.pass_time(2 * SLIGHT_LOAD_INTERVAL_SECONDS)
    assert not bench.timers.due
