"""Log probabilities on their way from columns to text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.common.errors import ProtocolViolation
from services.frontend.core.logprobs import LogprobLedger, positions_of
from switchgear.common.v1 import outputs_pb2


@given(
    st.lists(
        st.tuples(
            st.integers(1, 5),
            st.integers(1, 4).flatmap(
                lambda width: st.lists(
                    st.lists(
                        st.tuples(st.integers(0, 2**32 - 1), st.floats(width=32, max_value=0)),
                        min_size=width,
                        max_size=width,
                    ),
                    min_size=1,
                    max_size=4,
                )
            ),
        )
    )
)
def test_columns_give_back_the_positions_they_were_made_of(
    entries: list[tuple[int, list[list[tuple[int, float]]]]],
) -> None:
    columns = outputs_pb2.Logprobs()
    for handle, positions in entries:
        columns.handles.append(handle)
        columns.position_counts.append(len(positions))
        columns.candidate_counts.append(len(positions[0]))
        for position in positions:
            columns.token_ids.extend(token for token, _ in position)
            columns.logprobs.extend(logprob for _, logprob in position)
    assert list(positions_of(columns)) == entries


@pytest.mark.parametrize(
    "columns",
    [
        outputs_pb2.Logprobs(handles=[1]),
        outputs_pb2.Logprobs(handles=[1], position_counts=[1], candidate_counts=[0]),
        outputs_pb2.Logprobs(
            handles=[1], position_counts=[2], candidate_counts=[1], token_ids=[5], logprobs=[-1.0]
        ),
        outputs_pb2.Logprobs(
            handles=[1], position_counts=[1], candidate_counts=[1], token_ids=[5], logprobs=[]
        ),
    ],
)
def test_columns_that_do_not_fit_together_break_the_protocol(
    columns: outputs_pb2.Logprobs,
) -> None:
    with pytest.raises(ProtocolViolation):
        list(positions_of(columns))


@given(st.lists(st.text("abc", max_size=3)), st.lists(st.integers(0, 5)))
def test_a_token_comes_out_with_the_first_character_of_its_text(
    pieces: list[str], reads: list[int]
) -> None:
    ledger, found, read = LogprobLedger(), [], 0
    for index, piece in enumerate(pieces):
        ledger.add([(index, -1.0)], piece)
    text = "".join(pieces)
    for count in reads:
        ledger.read(text[read : read + count])
        read = min(len(text), read + count)
        found += ledger.take()
        begins = [len("".join(pieces[:index])) for index in range(len(pieces))]
        assert [token.begin for token in found] == [begin for begin in begins if begin < read]
    found += ledger.take(rest=True)
    assert [token.token_id for token in found] == list(range(len(pieces)))
