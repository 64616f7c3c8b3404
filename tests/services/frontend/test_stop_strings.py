"""The stop matcher against the definition of what it does."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.frontend.core.stop_strings import StopMatcher

texts = st.text("ab", max_size=30)
stops = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def naive(text: str, stop_strings: list[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(texts, stops, st.lists(st.integers(0, 30)))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, stop_strings: list[str], cuts: list[int]
) -> None:
    borders = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    matcher, out = StopMatcher(stop_strings), ""
    for begin, end in pairwise(borders):
        out += matcher.feed(text[begin:end])
        assert naive(text, stop_strings)[0].startswith(out), "part of a stop string leaked"
        if matcher.is_stopped:
            break
    out += matcher.flush()
    assert (out, matcher.is_stopped) == naive(text, stop_strings)


@given(texts, stops)
def test_nothing_is_held_back_that_can_not_become_a_stop_string(
    text: str, stop_strings: list[str]
) -> None:
    matcher = StopMatcher(stop_strings)
    out = matcher.feed(text)
    if not matcher.is_stopped:
        held = text[len(out) :]
        assert not held or any(stop.startswith(held) for stop in stop_strings)


@given(texts, stops)
def test_a_stop_string_that_is_kept_ends_the_text_and_nothing_is_held_back(
    text: str, stop_strings: list[str]
) -> None:
    matcher = StopMatcher(stop_strings, keeps_stop=True)
    out = matcher.feed(text)
    lost = StopMatcher(stop_strings)
    before = lost.feed(text)
    assert matcher.is_stopped == lost.is_stopped
    assert out.startswith(before)
    assert text.startswith(out)
    if matcher.is_stopped:
        assert out[len(before) :] in stop_strings
    else:
        assert out == text


def test_a_partial_match_is_held_until_it_is_settled() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.feed(piece) for piece in ("one E", "N", "d two", " EN", "D three")] == [
        "one ",
        "",
        "ENd two",
        " ",
        "",
    ]
    assert matcher.is_stopped
