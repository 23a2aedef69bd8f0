"""How much one session does at once on a node (P10)."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from nonstick.core.refusals import TOO_MANY_REQUESTS, TOO_MANY_STREAMS, Refusal
from nonstick.session.quotas import Quota, QuotaOfEach


def test_each_session_has_its_own_slots() -> None:
    quota = QuotaOfEach(2, TOO_MANY_STREAMS)
    with quota.hold("a"), quota.hold("a"):
        with pytest.raises(Refusal) as refused, quota.hold("a"):
            pass
        assert refused.value.reason is TOO_MANY_STREAMS
        with quota.hold("b"):
            pass


def test_slot_is_always_free_again() -> None:
    """However its block ended."""
    quota = QuotaOfEach(1, TOO_MANY_STREAMS)
    for _ in range(3):
        with pytest.raises(LookupError), quota.hold("a"):
            raise LookupError
    with quota.hold("a"):
        pass


def test_idle_session_leaves_no_slots() -> None:
    """Sessions come and go for as long as the node lives."""
    quota = QuotaOfEach(2, TOO_MANY_STREAMS)
    with ExitStack() as stack:
        for number in range(100):
            stack.enter_context(quota.hold(str(number)))
            stack.enter_context(quota.hold(str(number)))
    assert not quota._held


@pytest.mark.parametrize(("slots", "share", "most"), [(10, 0.5, 5), (10, 0.19, 1), (10, 0.01, 1), (1, 0.5, 1)])
def test_every_principals_share_has_a_slot(slots: int, share: float, most: int) -> None:
    quota = Quota(slots, TOO_MANY_STREAMS, share=share, share_held=TOO_MANY_REQUESTS)
    with ExitStack() as stack:
        for holder in range(most):
            quota.check(b"ada")
            stack.enter_context(quota.hold(holder, b"ada"))
        with pytest.raises(Refusal) as refused:
            quota.check(b"ada")
        assert refused.value.reason is TOO_MANY_REQUESTS
        for holder in range(most, slots):
            quota.check()
            stack.enter_context(quota.hold(holder))
        with pytest.raises(Refusal) as refused:
            quota.check()
        assert refused.value.reason is TOO_MANY_STREAMS
    quota.check(b"ada")
    assert not len(quota)
