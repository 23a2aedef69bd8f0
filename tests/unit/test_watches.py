"""The watches of one process: who is called, when, and when not any more."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from nonstick.store import News
from nonstick.stores.common.watches import Watches

pytestmark = pytest.mark.anyio


async def turn() -> None:
    """One turn of the event loop, in which what is due is called."""
    await asyncio.sleep(0)


async def test_wake_comes_in_the_next_turn() -> None:
    """A wake is never called inside the call that caused it."""
    watches, said = Watches[str](), list[str | None]()
    watches.add("key", said.append)
    watches.announce("key", "news")
    assert said == []
    await turn()
    assert said == ["news"]


async def test_wakes_are_told_apart_by_key() -> None:
    """Of one key, every watch; of another, none."""
    watches, one, two, other = Watches[str](), list[str | None](), list[str | None](), list[str | None]()
    for key, said in (("key", one), ("key", two), ("other", other)):
        watches.add(key, said.append)
    watches.announce("key", "news")
    watches.announce("nobody's", "lost")
    await turn()
    assert (one, two, other) == (["news"], ["news"], [])
    watches.announce_all()
    await turn()
    assert (one, two, other) == (["news", None], ["news", None], [None])


async def test_stopped_watch_is_not_called() -> None:
    """Not even for what was announced before; and stopping it twice stops no other."""
    watches, first, second = Watches[str](), list[str | None](), list[str | None]()
    _, stop = watches.add("key", first.append)
    watches.announce("key", "news")
    stop()
    assert "key" not in watches
    watches.add("key", second.append)
    stop()
    assert list(watches) == ["key"]
    watches.announce("key", "more")
    await turn()
    assert (first, second) == ([], ["more"])


async def test_cleared_watches_are_silent() -> None:
    """A store that is closed wakes nobody."""
    watches, said = Watches[str](), list[str | None]()
    _, stop = watches.add("key", said.append)
    watches.announce("key", "news")
    watches.clear()
    assert not watches
    await turn()
    stop()
    assert said == []


async def test_wake_that_raises_silences_none(caplog: pytest.LogCaptureFixture) -> None:
    """The other watches are called; the log says what was raised and where, not its text (P13)."""
    watches, said, payload = Watches[News](), list[News | None](), secrets.token_hex(8)

    def broken(news: News | None) -> None:
        raise RuntimeError(payload)

    watches.add("key", broken)
    watches.add("key", said.append)
    watches.announce("key", None)
    await turn()
    assert said == [None]
    assert "a wake raised" in caplog.text
    assert "RuntimeError" in caplog.text
    assert payload not in caplog.text
