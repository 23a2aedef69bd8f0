"""Sessions as the tests of the contract leave them and find them."""

from __future__ import annotations

import pytest

from nonstick.errors import SessionNotFound, StoreError
from nonstick.store import Batch, Cursor, Store
from nonstick.testing.contract.tools import drafts, read_all, texts

__all__ = ["LONG", "SHORT", "assert_gone", "assert_refused", "empty_log", "leave_of_everything"]

LONG = 600.0
"""Lifetime of sessions that must not expire during a test, seconds."""

SHORT = 0.8
"""Lifetime of those that must, seconds."""


async def empty_log(store: Store, key: str) -> str:
    """Creates a session; returns its key."""
    await store.create(key, {}, lifetime=LONG)
    return key


async def leave_of_everything(store: Store, key: str) -> Batch:
    """Leaves something of every kind in the session; returns a batch that it knows by its writer and sequence."""
    batch = Batch(drafts(b"old"), writer="w", sequence=1, cancel="r", expect=["pending"], fields={"more": b"1"})
    await store.append(key, batch)
    assert texts(await read_all(store, key))[-1:] == [b"old"]
    return Batch(batch.events, writer="w", sequence=1)


async def assert_refused(store: Store, key: str, error: type[StoreError], batch: Batch) -> None:
    """The batch gets this error, and neither the record nor the log has changed."""
    record, log = await store.load(key), await read_all(store, key)
    with pytest.raises(error):
        await store.append(key, batch)
    assert await store.load(key) == record
    assert await read_all(store, key) == log


async def assert_gone(store: Store, key: str, stream: int, head: Cursor) -> None:
    """Every method that can say so says SessionNotFound; those that pass over, pass over; nothing comes back."""
    refused = (
        lambda: store.load(key),
        lambda: store.update(key, {"x": b"2"}),
        lambda: store.append(key, Batch(drafts(b"late"))),
        lambda: store.append(key, Batch(drafts(b"late"), stream=stream, terminal=True)),
        lambda: store.append(key, Batch((), fields={"x": b"2"})),
        lambda: store.append(key, Batch((), settle="pending")),
        lambda: store.read(key, Cursor(0)),
        lambda: store.read(key, head),
    )
    await store.touch([key])
    await store.trim(key, streams=[stream], standalone_before=100)
    for call in refused:
        with pytest.raises(SessionNotFound):
            await call()
