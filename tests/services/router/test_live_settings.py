from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from google.protobuf import json_format, struct_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from libs.common.discovery import Table
from services.router.config import RouterSettings
from services.router.live_settings import LIVE_KEYS, LiveSettings


class Etcd:
    """What is under config/router/."""

    def __init__(self) -> None:
        self.table: Table[struct_pb2.Value] = Table()
        start = RouterSettings.model_validate({"temperature": 0.25})
        self.settings = LiveSettings(start, self.table)

    def put(self, key: str, value: Any) -> None:
        message = json_format.ParseDict(value, struct_pb2.Value())
        entries = {**self.table.entries, tuple(key.split("/")): message}
        self.table.replace(entries, self.table.revision + 1)

    def remove(self, key: str) -> None:
        entries = dict(self.table.entries)
        del entries[tuple(key.split("/"))]
        self.table.replace(entries, self.table.revision + 1)


@pytest.fixture
def etcd() -> Etcd:
    return Etcd()


def test_a_value_is_in_force_from_its_writing_to_its_removal(etcd: Etcd) -> None:
    assert etcd.settings.policy("m").temperature == 0.25
    etcd.put("temperature", 0.5)
    assert etcd.settings.policy("m").temperature == 0.5
    etcd.remove("temperature")
    assert etcd.settings.policy("m").temperature == 0.25


def test_a_model_may_have_its_own_value(etcd: Etcd) -> None:
    etcd.put("temperature/m", 0.5)
    etcd.put("min_remote_prefill_tokens", 77)
    mine, others = etcd.settings.policy("m"), etcd.settings.policy("other")
    assert (mine.temperature, mine.min_remote_prefill_tokens) == (0.5, 77)
    assert (others.temperature, others.min_remote_prefill_tokens) == (0.25, 77)


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", "inf"),
        ("temperature", None),
        ("min_remote_prefill_tokens", 1.5),
        ("min_remote_prefill_tokens", True),
        ("max_local_overlap", 1.5),
        ("prefill_policy", "no such"),
        ("decode_policy/m", 3),
    ],
)
def test_a_bad_value_is_rejected_once_and_the_previous_one_stays(
    etcd: Etcd, key: str, bad: Any
) -> None:
    good = {"temperature": 0.5, "min_remote_prefill_tokens": 10, "max_local_overlap": 0.3}
    etcd.put(key, good.get(key, "kv"))
    before = etcd.settings.policy("m")
    with capture_logs() as lines:
        etcd.put(key, bad)
        etcd.put("decode_weight", 0.5)
    assert [line["event"] for line in lines] == ["live setting rejected", "live setting"]
    assert etcd.settings.policy("m") == replace(before, decode_weight=0.5)
    assert [*etcd.settings.rejected] == [tuple(key.split("/"))]
    etcd.put(key, good.get(key, "kv"))
    assert etcd.settings.rejected == {}


@pytest.mark.parametrize("key", ["temprature", "etcd_url", "temperature/m/x"])
def test_an_unknown_key_is_rejected_with_the_known_ones(etcd: Etcd, key: str) -> None:
    etcd.put(key, 1)
    [(_, problem)] = etcd.settings.rejected.values()
    assert "min_remote_prefill_tokens" in problem
    etcd.remove(key)
    assert etcd.settings.rejected == {}


def test_what_is_in_force_is_listed_with_where_it_comes_from(etcd: Etcd) -> None:
    etcd.put("temperature", 0.5)
    etcd.put("temperature/m", 2)
    listed = {(s.name, s.model): (s.value, s.is_live) for s in etcd.settings.settings()}
    assert listed["temperature", ""] == (0.5, True)
    assert listed["temperature", "m"] == (2, True)
    assert listed["decode_weight", ""] == (etcd.settings.start.decode_weight, False)
    assert {name for name, model in listed if not model} == set(LIVE_KEYS)
    assert etcd.settings.revision == 2


values = st.one_of(st.floats(-1, 2), st.integers(-5, 500), st.sampled_from(["kv", "x"]))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LIVE_KEYS), values | st.just(None)), max_size=20))
def test_whatever_is_written_the_settings_in_force_are_good(changes: list[tuple[str, Any]]) -> None:
    etcd = Etcd()
    for key, value in changes:
        etcd.put(key, value)
        current = {s.name: s.value for s in etcd.settings.settings()}
        RouterSettings.model_validate(current)
