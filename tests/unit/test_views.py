"""The views of sessions on one node: which are parked, for how long, and what is left of them."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
from mcp.server import Server
from mcp_types import ClientCapabilities, Implementation, InitializeRequestParams

from nonstick import Cluster
from nonstick.core.record import Record, opening_fields
from nonstick.core.settings import Settings
from nonstick.log.guard import GuardedStore
from nonstick.node.node import Node
from nonstick.session.kernel import KernelRunner
from nonstick.session.live import LiveSession
from nonstick.session.services import Served
from nonstick.store import Cursor, Loaded
from nonstick.stores.memory import MemoryStore

pytestmark = pytest.mark.anyio

MOST = 256
"""Views that a node parks."""
BEGINNING = Cursor(0)


class Forgetful(KernelRunner):
    """A runner of somebody's own, who has not said that it keeps nothing."""

    keeps_nothing = False


@asynccontextmanager
async def running(runner: Callable[..., KernelRunner] = KernelRunner) -> AsyncIterator[Node]:
    served = Served(partial(runner, Server("test"), None), "")
    async with (
        GuardedStore(MemoryStore()) as store,
        Node(served, store, Settings(), cluster_log=Cluster.private().log) as node,
    ):
        yield node


def fields_of(client: str = "client", /, **more: bytes) -> dict[str, bytes]:
    info = Implementation(name=client, version="1")
    params = InitializeRequestParams(protocol_version="2025-11-25", capabilities=ClientCapabilities(), client_info=info)
    return opening_fields("2025-11-25", params, b"") | {"initialized": b"1"} | more


def loaded_of(head: Cursor = BEGINNING, /, *, more: dict[str, bytes] | None = None) -> Loaded:
    return Loaded(fields_of() | (more or {}), head, frozenset())


def hydrated(node: Node, key: str, loaded: Loaded | None = None) -> LiveSession:
    """As a request's: the session's view, made or taken."""
    loaded = loaded or loaded_of()
    return node.hydrate(f"id of {key}", key, loaded, node.sessions.decode(key, loaded.fields))


def use(node: Node, key: str, loaded: Loaded | None = None) -> LiveSession:
    """A request comes and goes."""
    with hydrated(node, key, loaded) as session:
        assert session.runner
    return session


async def test_no_more_are_parked_than_may() -> None:
    """P10: those that were used last."""
    async with running() as node:
        for number in range(MOST + 44):
            use(node, str(number))
            use(node, "often")
        assert len(node.sessions.parked) == MOST
        assert node.sessions.parked == [*(str(number) for number in range(45, MOST + 44)), "often"]
        assert not node.sessions


async def test_unused_views_go_with_time() -> None:
    """P10, P13: what a node knows of a session, and its id, it forgets soon after the last request."""
    async with running() as node:
        views = node.sessions
        seldom, often = use(node, "seldom"), use(node, "often")
        views.age()
        assert use(node, "often") is often
        views.age()
        assert views.parked == ["often"]
        assert use(node, "seldom") is not seldom
        views.age()
        views.age()
        assert not views.parked


async def test_dropped_views_leave_no_garbage() -> None:
    """However they go, no one waits for the garbage collector."""
    async with running() as node:
        use(node, "warm")
        node.sessions.forget_parked("warm")
        left: list[weakref.ref[LiveSession]] = []
        gc.collect()
        gc.disable()
        try:
            left += (weakref.ref(use(node, f"full {number}")) for number in range(MOST + 10))
            for number in range(MOST + 10):
                node.sessions.forget_parked(f"full {number}")
            left.append(weakref.ref(use(node, "old")))
            node.sessions.age()
            node.sessions.age()
            left.append(weakref.ref(use(node, "changed")))
            left[-1]().connection.mine = 1  # type: ignore[union-attr]
            hydrated(node, "changed").evict()
            assert not node.sessions.parked
            assert [view for view in left if view() is not None] == []
            assert gc.collect() == 0
        finally:
            gc.enable()


async def test_parked_view_takes_few_bytes() -> None:
    """P10: those of a node are some megabytes at most, whatever clients say of themselves."""
    assert await bytes_of_each(fields_of("plain")) < 8 * 1024
    # Parsed, nothing takes more for its length.
    large = fields_of("large")
    large["client"] = large["client"].replace(b'"capabilities":{}', b'"capabilities":{"experimental":{"x":{"y":%s}}}')
    large["client"] %= b"[" + b",".join([b"[]"] * 400) + b"]"
    assert 1300 < sum(map(len, large.values())) < 1500
    assert await bytes_of_each(large) < 64 * 1024


async def bytes_of_each(fields: dict[str, bytes]) -> float:
    """Of memory, that each parked view takes whose session has this record, and a client of another name."""
    async with running() as node:
        use(node, "warm")
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for number in range(MOST):
                client = fields["client"].replace(b'"name":"', b'"name":"%d' % number)
                use(node, str(number), Loaded(fields | {"client": client}, BEGINNING, frozenset()))
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(node.sessions.parked) == MOST
    return (after - before) / MOST


@pytest.mark.parametrize(
    "loaded",
    [
        loaded_of(more={"state:key": b"1"}),
        loaded_of(more={"owner": b"another-00000000"}),
        loaded_of(more={"more": b"x" * 4096}),
    ],
    ids=["state", "owner", "long"],
)
async def test_what_records_say_parks_not(loaded: Loaded) -> None:
    """P10, P13."""
    async with running() as node:
        use(node, "it", loaded)
        assert not node.sessions.parked


async def test_strange_runners_serve_once() -> None:
    """What a runner keeps is nobody else's business, unless it says that this is nothing."""
    async with running(Forgetful) as node:
        use(node, "it")
        assert not node.sessions.parked


async def test_older_log_makes_view_anew() -> None:
    """P9: the store lost entries. What is here was at a place that is none any more."""
    async with running() as node:
        late = use(node, "it", loaded_of(Cursor(5, b"e")))
        assert use(node, "it", loaded_of(Cursor(5, b"e"))) is late
        early = use(node, "it", loaded_of(Cursor(4, b"d")))
        assert early is not late
        assert early.log.head == Cursor(4, b"d")


async def test_view_in_use_is_left_whole() -> None:
    """Something that began in a view has gone on while it was parked, and waits for a reply, say."""
    async with running() as node:
        session = use(node, "it")
        with session:
            assert use(node, "it") is not session
            assert session.connection.outbound
        assert node.sessions.parked == ["it"]
        # It parts when that ends, and is not kept a second time.
        assert "connection" not in vars(session)


async def test_end_of_parked_view_drops_it() -> None:
    """P6: what its own task was told by the store."""
    async with running() as node:
        session = use(node, "it")
        await session.end()
        assert not node.sessions.parked
        assert use(node, "it") is not session


async def test_equal_fields_are_decoded_once() -> None:
    async with running() as node:
        views = node.sessions
        first = hydrated(node, "it")
        with first:
            assert first.runner
            # It lives.
            assert views.decode("it", fields_of()) is first.record
        # It is parked.
        assert views.parked == ["it"]
        assert views.decode("it", fields_of()) is first.record
        assert views.decode("another", fields_of()) is not first.record
        subscribed = fields_of() | {"sub:1": b"a://b"}
        for changed in (fields_of(level=b"error"), fields_of("renamed"), fields_of(unknown=b"1"), subscribed):
            record = views.decode("it", changed)
            assert record == Record.from_fields(changed)
            assert record is not first.record


async def test_noted_values_yield_to_record() -> None:
    """What became of a record here is not what the store says of it."""
    async with running() as node:
        session = hydrated(node, "it")
        with session:
            assert session.runner
            session.note(log_level="error")
        assert node.sessions.parked == ["it"]
        assert use(node, "it").record.log_level is None
