from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.router.core.sessions import Sessions
from services.router.core.workers import InstanceId

TTL_SECONDS = 10.0
MAX_SESSIONS = 3


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "a", "b", "c", "d"]), st.integers(1, 4), st.floats(0, TTL_SECONDS)
        )
    )
)
def test_it_agrees_with_a_list_of_all_requests(requests: list[tuple[str, int, float]]) -> None:
    sessions = Sessions(ttl_seconds=TTL_SECONDS, max_sessions=MAX_SESSIONS)
    past: list[tuple[str, int, float]] = []
    now = 0.0
    for session_id, instance, pause in requests:
        now += pause
        sessions.served("m", session_id, InstanceId(instance), now)
        past.append((session_id, instance, now))
        assert len(sessions) <= MAX_SESSIONS
        last = {name: (by, at) for name, by, at in past if name}
        recent = sorted(last, key=lambda name: [n for n, _, _ in past][::-1].index(name))
        for name in ("", "a", "b", "c", "d"):
            is_known = name in recent[:MAX_SESSIONS] and last[name][1] + TTL_SECONDS > now
            assert sessions.worker("m", name, now) == (last[name][0] if is_known else None)


def test_models_have_sessions_of_their_own() -> None:
    sessions = Sessions(ttl_seconds=TTL_SECONDS)
    sessions.served("m", "a", InstanceId(1), 0)
    sessions.served("other", "a", InstanceId(2), 0)
    assert sessions.worker("m", "a", 0) == 1


def test_a_session_is_remembered_for_as_long_after_its_last_request() -> None:
    sessions = Sessions(ttl_seconds=TTL_SECONDS)
    sessions.served("m", "a", InstanceId(1), 0)
    sessions.served("m", "a", InstanceId(1), 6)
    assert sessions.worker("m", "a", 15) == 1
    assert sessions.worker("m", "a", 16) is None
    sessions.served("m", "b", InstanceId(1), 16)
    assert len(sessions) == 1
