"""Which models can be served, by their cards."""

from __future__ import annotations

from services.frontend.core.model_table import known_models
from switchgear.common.v1.generation_pb2 import POOLING_TASK_EMBED
from switchgear.discovery.v1.discovery_pb2 import ROLE_DECODE_WORKER, ROLE_PREFILL_WORKER
from tests.services.frontend.byte_model import CHECKSUM, NAME, card


def test_a_decode_worker_suffices() -> None:
    model = known_models([card(1, aliases=("b", "a"))])[NAME]
    assert model.missing == ""
    assert model.aliases == ("a", "b")
    assert model.instance_ids == (1,)


def test_prefill_workers_alone_do_not() -> None:
    assert known_models([card(1, ROLE_PREFILL_WORKER)])[NAME].missing == "a decode worker"


def test_a_decode_worker_can_need_a_prefill_worker() -> None:
    needy = card(1, needs=(ROLE_PREFILL_WORKER,))
    assert known_models([needy])[NAME].missing == "a prefill worker"
    assert known_models([needy, card(2, ROLE_PREFILL_WORKER)])[NAME].missing == ""
    assert known_models([needy, card(3)])[NAME].missing == ""


def test_the_smallest_context_counts() -> None:
    cards = [card(1, context_length_tokens=100), card(2, context_length_tokens=50)]
    assert known_models(cards)[NAME].context_length_tokens == 50


def test_the_worker_that_loaded_first_decides_on_the_files() -> None:
    cards = [
        card(1, created_unix_seconds=20, files_checksum="other"),
        card(2, created_unix_seconds=10),
        card(3, ROLE_PREFILL_WORKER, created_unix_seconds=5),
    ]
    model = known_models(cards)[NAME]
    assert model.files_checksum == CHECKSUM
    assert model.instance_ids == (3, 2)


def test_models_are_apart_from_each_other() -> None:
    models = known_models([card(1, model="a"), card(2, ROLE_PREFILL_WORKER, model="b")])
    assert {name: bool(model.missing) for name, model in models.items()} == {"a": False, "b": True}


def test_roles_are_spelt_as_people_read_them() -> None:
    assert known_models([card(1, needs=(ROLE_DECODE_WORKER,))])[NAME].missing == ""


def test_what_a_model_does_is_what_its_first_worker_does() -> None:
    assert known_models([card(1)])[NAME].pooling_tasks == ()
    both = [card(1, created_unix_seconds=20), card(2, created_unix_seconds=10, embeds=True)]
    assert known_models(both)[NAME].pooling_tasks == (POOLING_TASK_EMBED,)
