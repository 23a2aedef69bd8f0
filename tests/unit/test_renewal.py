"""Which sessions a node keeps from expiring (P10)."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from nonstick.core.settings import Settings
from nonstick.session.renewal import Renewal, unattended_seconds

pytestmark = pytest.mark.anyio

SETTINGS = Settings(lifetime=100.0, unattended_timeout=1000.0, unconfirmed_lifetime=50.0)


def view(*, unconfirmed: bool = False, users: int = 0, heard: float = 0.0, seen: bool = False) -> Any:
    """A live view, as far as a renewal looks at it.

    Args:
        heard: Seconds since its client was heard.
        seen: A request of its client's is open here, and its connection takes bytes.
    """
    answer = SimpleNamespace(shows_client=lambda _: seen, began=float("inf"))
    return SimpleNamespace(
        record=SimpleNamespace(unconfirmed=unconfirmed),
        users=users,
        log=SimpleNamespace(heard_at=time.monotonic() - heard),
        exchanges={"1": SimpleNamespace(answer=answer)},
    )


def due(*, unconfirmed: bool = False, **sessions: Any) -> list[str]:
    return Renewal(sessions, [], SETTINGS).due(unconfirmed=unconfirmed)


@pytest.mark.parametrize(("timeout", "seconds"), [(None, 100.0), (10.0, 100.0), (100.0, 100.0), (1000.0, 1000.0)])
def test_work_lasts_at_least_one_lifetime(timeout: float | None, seconds: float) -> None:
    assert unattended_seconds(Settings(lifetime=100.0, unattended_timeout=timeout)) == seconds


async def test_short_lifetimes_are_renewed_by_themselves() -> None:
    """And with all others: a session that is not confirmed needs both."""
    sessions = {"new": view(unconfirmed=True, seen=True), "used": view(seen=True)}
    assert due(**sessions) == ["new", "used"]
    assert due(unconfirmed=True, **sessions) == ["new"]


async def test_working_session_is_renewed_unseen() -> None:
    """Its last renewal is so long before the end of its time that it expires then."""
    sessions = {
        "idle": view(),
        "works": view(users=1),
        "works still": view(users=1, heard=890.0),
        "worked for too long": view(users=1, heard=910.0),
        "new, works still": view(users=1, heard=940.0, unconfirmed=True),
        "new, worked for too long": view(users=1, heard=960.0, unconfirmed=True),
    }
    assert due(**sessions) == ["works", "works still", "new, works still"]


async def test_seeing_a_client_restarts_its_time() -> None:
    seen = view(seen=True, users=1, heard=10_000.0)
    assert due(seen=seen) == ["seen"]
    seen.exchanges.clear()
    assert due(seen=seen) == ["seen"]
