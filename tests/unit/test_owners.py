"""What a node makes of the owner that a record names: every owner, whatever the node holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nonstick.core.owners import HERE, NOBODY, Elsewhere, Found, Step, Suspects, find, next_step, owner_in
from nonstick.core.record import LOST, OWNER, RELEASED

HELD = {"nothing": None, "not ready": False, "ready": True}

FOUND: dict[tuple[str | None, str], Found] = {
    # Without an owner: it is to get one.
    (None, "nothing"): Found(NOBODY, settles=True),
    (None, "not ready"): Found(NOBODY, looks=True, settles=True),
    (None, "ready"): Found(NOBODY, looks=True, settles=True),
    # Given up by its owner.
    (RELEASED, "nothing"): Found(NOBODY, settles=True),
    (RELEASED, "not ready"): Found(NOBODY, looks=True, settles=True),
    (RELEASED, "ready"): Found(NOBODY, looks=True, settles=True),
    # Lost with its owner.
    (LOST, "nothing"): Found(None, settles=True),
    (LOST, "not ready"): Found(None, looks=True, settles=True),
    (LOST, "ready"): Found(None, looks=True, settles=True),
    # This node's.
    ("me", "nothing"): Found(Elsewhere("me")),
    ("me", "not ready"): Found(Elsewhere("me")),
    ("me", "ready"): Found(HERE),
    # Another node's.
    ("other", "nothing"): Found(Elsewhere("other")),
    ("other", "not ready"): Found(Elsewhere("other"), looks=True),
    ("other", "ready"): Found(Elsewhere("other"), looks=True),
}

STEPS: dict[tuple[str | None, bool, bool], Step] = {
    # owner, whether it lives, whether what it held can be built anew
    (None, False, False): Step.TAKE,
    (None, False, True): Step.TAKE,
    (RELEASED, False, False): Step.END,
    (RELEASED, False, True): Step.TAKE,
    (LOST, False, False): Step.END,
    (LOST, False, True): Step.END,
    ("other", False, False): Step.END,
    ("other", False, True): Step.TAKE,
    ("other", True, False): Step.LEAVE,
    ("other", True, True): Step.LEAVE,
}


@pytest.mark.parametrize(("owner", "held"), FOUND)
def test_holder_runs_what_arrives(owner: str | None, held: str) -> None:
    """P7."""
    assert find(owner, here="me", ready=HELD[held]) == FOUND[owner, held]


@given(owner=st.none() | st.text(), ready=st.none() | st.booleans())
def test_foreign_sessions_run_nothing_here(owner: str | None, ready: bool | None) -> None:
    """P7: whatever its name is. Only what is ready, and this node's by the record, runs here."""
    found = find(owner, here="me", ready=ready)
    assert (found.where is HERE) == (ready is True and owner == "me")
    assert not (found.settles and isinstance(found.where, Elsewhere))


@pytest.mark.parametrize(("owner", "lives", "rebuilds"), STEPS)
def test_dead_owners_session_is_taken(owner: str | None, lives: bool, rebuilds: bool) -> None:
    """P7."""
    assert next_step(owner, lives=lives, rebuilds=rebuilds) is STEPS[owner, lives, rebuilds]


def test_owner_is_what_the_record_says() -> None:
    assert owner_in({}) is None
    assert owner_in({OWNER: b""}) == RELEASED
    assert owner_in({OWNER: b"node-1"}) == "node-1"


def test_suspicion_begins_when_seen_dead() -> None:
    """P7: after an outage of the store the living need a moment to renew."""
    suspects = Suspects()
    assert suspects.seen("a", True, 100.0) == 0.0
    assert suspects.seen("a", True, 100.7) == pytest.approx(0.7)
    assert suspects.seen("b", True, 101.0) == 0.0
    assert suspects.seen("a", True, 101.5) == pytest.approx(1.5)


def test_node_seen_alive_is_suspected_anew() -> None:
    suspects = Suspects()
    suspects.seen("a", True, 100.0)
    assert suspects.seen("a", False, 101.0) < 0.0
    assert suspects.seen("a", True, 102.0) == 0.0


def test_abandoned_suspicion_is_forgotten() -> None:
    """P7: the outage that it came from is long over. P10: the names of dead nodes are not kept."""
    suspects = Suspects()
    suspects.seen("a", True, 100.0)
    assert suspects.seen("a", True, 100.0 + Suspects.FORGET_AFTER) == 0.0
    for number in range(1000):
        suspects.seen(f"n{number}", True, 200.0 + number)
    assert len(suspects._seen) <= Suspects.FORGET_AFTER
