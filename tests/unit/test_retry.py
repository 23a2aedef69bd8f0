"""Background work that waits until a store answers."""

from __future__ import annotations

import pytest

from nonstick.errors import SessionNotFound, StoreUnavailable, StoreUnusable
from nonstick.waiting.retry import retry_until_answered

pytestmark = pytest.mark.anyio


async def test_call_is_repeated_until_answered() -> None:
    """A store that is away, or that will not do for now, is asked again (P9)."""
    troubles: list[StoreUnavailable] = [StoreUnusable("its login"), StoreUnavailable(), StoreUnavailable()]

    async def call() -> str:
        if troubles:
            raise troubles.pop()
        return "answered"

    assert await retry_until_answered(call, pause=0) == "answered"
    assert troubles == []


async def test_refusal_is_an_answer() -> None:
    """What the store says of the session is not asked twice."""
    asked = []

    async def call() -> None:
        asked.append(1)
        raise SessionNotFound

    with pytest.raises(SessionNotFound):
        await retry_until_answered(call, pause=0)
    assert asked == [1]
