"""What the load consists of."""

import json
from itertools import pairwise

import pytest

from benchmarks.serving import scenarios
from benchmarks.serving.scenarios import Scenario


def scenario(prompt_bytes: int = 0, *, is_streamed: bool = True) -> Scenario:
    return Scenario(
        name="s",
        clients=1,
        output_tokens=64,
        is_streamed=is_streamed,
        prompt_bytes=prompt_bytes,
    )


@pytest.mark.parametrize("prompt_bytes", [0, 16_000])
def test_requests_differ_only_in_their_id(prompt_bytes: int) -> None:
    body = scenarios.body(scenario(prompt_bytes), "m")
    first, second = json.loads(body.text("0-1")), json.loads(body.text("0-2"))
    assert first != second
    assert json.loads(body.text("0-2").replace("0-2", "0-1")) == first


def test_requests_of_two_runs_differ() -> None:
    body = scenarios.body(scenario(), "m")
    assert body.of_run("a").text("1") != body.of_run("b").text("1")


def test_short_prompts_share_their_beginning() -> None:
    body = scenarios.body(scenario(), "m")
    first, second = (json.loads(body.text(number))["messages"] for number in ("1", "2"))
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_long_prompts_differ_from_their_first_words_on() -> None:
    [message] = json.loads(scenarios.body(scenario(16_000), "m").text("7-7"))["messages"]
    assert message["content"].index("7-7") < 16


def test_a_long_prompt_has_the_length_that_was_asked_for() -> None:
    assert len(scenarios.filler_text(220_000)) == 220_000


def test_usage_is_asked_for_only_where_it_can_be() -> None:
    whole = scenarios.body(scenario(is_streamed=False), "m", with_usage=True)
    streamed = scenarios.body(scenario(), "m", with_usage=True)
    assert "stream_options" not in json.loads(whole.text("1"))
    assert json.loads(streamed.text("1"))["stream_options"] == {"include_usage": True}


def test_the_output_has_a_fixed_length() -> None:
    request = json.loads(scenarios.body(scenario(), "m").text("1"))
    assert (request["max_tokens"], request["ignore_eos"]) == (64, True)


def test_scenarios_have_names_of_their_own() -> None:
    names = sorted(one.name for one in scenarios.FULL)
    assert all(one != other for one, other in pairwise(names))
    assert {one.name for one in scenarios.QUICK} < set(names)
