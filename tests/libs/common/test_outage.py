"""An outage is told once, and its end."""

from __future__ import annotations

from libs.common.outage import REPEAT_SECONDS, Outage


def test_it_is_said_at_first_and_every_while_whoever_finds_it() -> None:
    outage = Outage()
    assert outage.failed("models/", 100)
    assert not outage.failed("instances/", 100.5)
    assert not outage.failed("models/", 100 + REPEAT_SECONDS / 2)
    assert outage.waiting == ["instances/", "models/"]
    assert outage.failed("models/", 100 + REPEAT_SECONDS)
    assert not outage.failed("instances/", 100.5 + REPEAT_SECONDS)


def test_the_last_one_that_finds_it_again_hears_how_long_it_was() -> None:
    outage = Outage()
    outage.failed("models/", 100)
    outage.failed("instances/", 101)
    assert outage.worked("models/", 105) is None
    assert outage.worked("models/", 106) is None
    assert outage.worked("instances/", 107) == 7
    assert outage.worked("instances/", 108) is None


def test_the_next_one_is_said_at_once() -> None:
    outage = Outage()
    outage.failed("models/", 100)
    outage.worked("models/", 101)
    assert outage.failed("models/", 102)
    assert outage.worked("models/", 103) == 1
