"""Every store refuses in the same words: what a log says does not depend on where sessions are kept."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final

import pytest

from nonstick.errors import (
    AlreadyExists,
    Diverged,
    Fenced,
    NotPending,
    SessionNotFound,
    StoreError,
    StreamClosed,
)
from nonstick.store import NEW_STREAM, Batch, Cursor, Store
from nonstick.stores import open_store
from nonstick.testing import PostgresServer, ValkeyServer
from nonstick.testing.contract.checks import LONG
from nonstick.testing.contract.tools import drafts

pytestmark = pytest.mark.anyio

KEY: Final = "key"
STREAM: Final = 1
ENDED: Final = 2

REFUSED: Final[dict[type[StoreError], list[Callable[[Store], Awaitable[object]]]]] = {
    SessionNotFound: [
        lambda store: store.load("nobody's"),
        lambda store: store.update("nobody's", {"x": b"1"}),
        lambda store: store.append("nobody's", Batch(drafts(b"x"))),
        lambda store: store.read("nobody's", Cursor(0)),
        lambda store: store.skim("nobody's", Cursor(0)),
    ],
    AlreadyExists: [lambda store: store.create(KEY, {}, lifetime=LONG)],
    StreamClosed: [
        lambda store: store.append(KEY, Batch(drafts(b"x"), stream=ENDED)),
        lambda store: store.append(KEY, Batch(drafts(b"x"), stream=99)),
    ],
    Fenced: [lambda store: store.append(KEY, Batch(drafts(b"x"), stream=STREAM, attempt=7))],
    NotPending: [
        lambda store: store.append(KEY, Batch(drafts(b"x"), settle="q")),
        lambda store: store.append(KEY, Batch(drafts(b"x"), answers="q")),
    ],
    Diverged: [
        lambda store: store.read(KEY, Cursor(99, bytes(8))),
        lambda store: store.read(KEY, Cursor(1, b"no event")),
        lambda store: store.append(KEY, Batch(drafts(b"x"), stream=STREAM, writer="w", sequence=3)),
    ],
}


@pytest.fixture(params=["memory", "sqlite", "redis", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """One of each kind, with a session that has an open stream and one that has ended."""
    name = f"test{secrets.token_hex(6)}"
    match request.param:
        case "memory":
            url = "memory:"
        case "sqlite":
            url = f"sqlite:///{tmp_path}/store.db"
        case "redis":
            valkey: ValkeyServer = request.getfixturevalue("valkey")
            url = f"{valkey.url}?prefix={name}"
        case _:
            postgres: PostgresServer = request.getfixturevalue("postgres")
            url = f"{postgres.url}?schema={name}"
    async with open_store(url) as store:
        await store.create(KEY, {}, lifetime=LONG)
        await store.append(KEY, Batch(drafts(b"opened"), stream=NEW_STREAM))
        await store.append(KEY, Batch(drafts(b"opened"), stream=NEW_STREAM, terminal=True))
        yield store


@pytest.mark.parametrize("error", REFUSED)
async def test_stores_refuse_in_the_same_words(store: Store, error: type[StoreError]) -> None:
    """`StoreError.usual`, whole: nothing of the key, and nothing of the store's own (P13)."""
    for refuse in REFUSED[error]:
        with pytest.raises(error) as refused:
            await refuse(store)
        assert str(refused.value) == error.usual


async def test_stream_without_event_is_refused(store: Store) -> None:
    """A stream is named by the position of its first event: a batch without one is a caller's mistake."""
    with pytest.raises(ValueError, match="a stream opens with an event"):
        await store.append(KEY, Batch((), stream=NEW_STREAM))
