"""Appends whose answers are lost on the way, on a real Valkey: repeated, they land exactly once."""

from __future__ import annotations

import random
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from nonstick.errors import StoreUnavailable
from nonstick.store import Batch, Store
from nonstick.stores import open_store
from nonstick.testing import FaultProxy, ValkeyServer, read_all
from nonstick.testing.contract.tools import deadline, drafts, texts

pytestmark = pytest.mark.anyio

APPENDS = 100


@pytest.fixture
async def proxy(valkey: ValkeyServer) -> AsyncIterator[FaultProxy]:
    """A network that loses answers."""
    async with FaultProxy(valkey.url) as proxy:
        yield proxy


@pytest.fixture
async def store(proxy: FaultProxy) -> AsyncIterator[Store]:
    """A store that reaches its server by way of the proxy."""
    async with open_store(f"{proxy.url}?prefix=test-{secrets.token_hex(6)}") as store:
        await store.create("key", {}, lifetime=600)
        yield store


async def append_until_answered(store: Store, batch: Batch) -> int:
    """Repeats the append as it is until it is answered; returns how often it was refused an answer."""
    failures = 0
    async with deadline():
        while True:
            try:
                await store.append("key", batch)
            except StoreUnavailable:
                failures += 1
            else:
                return failures


async def lose_some(store: Store, proxy: FaultProxy, *, writer: str) -> tuple[list[bytes], int]:
    """Appends with about every fifth answer lost; returns what is in the log, and how many answers were lost."""
    dice = random.Random(5)
    lost = 0
    for n in range(1, APPENDS + 1):
        marker = f"event-{n:03}-{secrets.token_hex(4)}".encode()
        if loses := dice.random() < 0.2:
            proxy.lose_next_reply(after=marker)
        batch = Batch(drafts(marker), writer=writer, sequence=n)
        failures = await append_until_answered(store, batch)
        assert proxy.replies_to_lose == 0, "the fault did not happen"
        # The client may have repeated it by itself, so the number of failures says nothing.
        assert failures <= loses * 10
        lost += loses
    return [data[:9] for data in texts(await read_all(store, "key"))], lost


async def test_append_with_lost_answer_lands_once(store: Store, proxy: FaultProxy) -> None:
    """Every write may be repeated as it was; a (writer, sequence) is written once (P3)."""
    written, lost = await lose_some(store, proxy, writer="w")
    assert lost > 10
    assert written == [b"event-%03d" % n for n in range(1, APPENDS + 1)]


async def test_lost_answer_doubles_append_without_writer(store: Store, proxy: FaultProxy) -> None:
    """The fault is real: without (writer, sequence) each lost answer makes a second entry."""
    written, lost = await lose_some(store, proxy, writer="")
    assert len(written) >= APPENDS + lost
    assert len(set(written)) == APPENDS


async def test_append_to_cut_store_is_unavailable(store: Store, proxy: FaultProxy) -> None:
    """A failure to reach the store raises StoreUnavailable and nothing else; it recovers by itself (P9)."""
    batch = Batch(drafts(b"x"), writer="w", sequence=1)
    await proxy.cut()
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await store.append("key", batch)
    with pytest.raises(StoreUnavailable):
        await store.load("key")
    await proxy.heal()
    await append_until_answered(store, batch)
    assert (await store.append("key", replace(batch, events=drafts(b"y")))).duplicate
    assert texts(await read_all(store, "key")) == [b"x"]


async def test_fault_proxy_keeps_its_port() -> None:
    """The proxy's URL is the target's, but for the address."""
    async with FaultProxy("redis://user:secret@127.0.0.1:1/0?prefix=x") as proxy:
        parts = urlsplit(proxy.url)
        assert (parts.username, parts.port, parts.path, parts.query) == ("user", proxy.port, "/0", "prefix=x")
