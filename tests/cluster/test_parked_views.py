"""A view in which nothing runs is kept for its session's next request, and no handler or client can tell."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from mcp.server.connection import Connection

from nonstick import EncryptedStore, current_connection
from nonstick.core.names import session_key
from nonstick.core.record import subscription_field
from nonstick.session.live import current_session
from nonstick.store import Store
from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import Member, Session
from tests.cluster.conftest import MakeStore
from tests.cluster.servers import opening, request
from tests.cluster.stage import (
    Context,
    Stage,
    call,
    cancel,
    eventually,
    node_of,
    notification,
    staged,
    text_of,
)

pytestmark = pytest.mark.anyio


def encrypted() -> Store:
    return EncryptedStore(MemoryStore(), [secrets.token_bytes(32)])


@pytest.fixture(params=["clear", "encrypted"])
def either(request: pytest.FixtureRequest) -> MakeStore:
    """One store for all nodes, encrypted and not."""
    store = encrypted() if request.param == "encrypted" else MemoryStore()
    return lambda: store


def looking(stage: Stage) -> list[Connection]:
    """Adds a tool that says what it sees of its session. The connections that it saw."""
    seen: list[Connection] = []

    @stage.tool
    async def look(ctx: Context, arguments: dict[str, Any]) -> str:
        connection, session = current_connection(), current_session()
        assert session is not None
        assert connection.client_params is not None
        seen.append(connection)
        record = session.record
        return " ".join(
            (
                connection.client_params.client_info.name,
                connection.protocol_version,
                "initialized" if connection.initialized.is_set() else "new",
                str(record.log_level),
                ",".join(sorted(record.subscriptions)) or "-",
                str(dict(connection.state)),
            )
        )

    return seen


async def look(member: Member, session: Session, request_id: int = 1) -> str:
    return str(text_of((await member.post(call("look", request_id), session)).json()))


def is_parked(member: Member, session: Session) -> bool:
    views, key = node_of(member).sessions, session_key(session.id)
    return key in views.parked and key not in views


def is_forgotten(member: Member, session: Session) -> bool:
    views, key = node_of(member).sessions, session_key(session.id)
    return key not in views.parked and key not in views


async def test_next_request_gets_parked_view(make_store: MakeStore) -> None:
    """P10: nothing is done for the session meanwhile."""
    async with staged(make_store) as (stage, a, b, _c):
        seen = looking(stage)
        session = await a.open()
        texts = []
        for number in range(3):
            texts.append(await look(b, session, number))
            await eventually(lambda: is_parked(b, session))
            assert not node_of(b).sessions
        assert texts == ["test 2025-11-25 initialized None - {}"] * 3
        assert seen[0] is seen[1] is seen[2]


async def test_opened_session_is_parked_at_once(memory: MakeStore) -> None:
    async with staged(memory) as (stage, a, _b, _c):
        seen = looking(stage)
        session = await a.open(initialized=False)
        await eventually(lambda: is_parked(a, session))
        assert (await a.post(notification("notifications/initialized"), session)).status_code == 202
        for _ in range(2):
            await eventually(lambda: is_parked(a, session))
            assert "initialized" in await look(a, session)
        assert seen[0] is seen[1]


# ---- what handlers keep


def set_attribute(connection: Connection) -> None:
    connection.mine = "kept"  # type: ignore[attr-defined]


def remove_attribute(connection: Connection) -> None:
    del connection.session_id


def replace_attribute(connection: Connection) -> None:
    connection.session_id = "mine"


def replace_state(connection: Connection) -> None:
    connection.state = {"mine": "kept"}


def mark_state(connection: Connection) -> None:
    connection.state.mine = "kept"  # type: ignore[attr-defined]


def replace_stack(connection: Connection) -> None:
    connection.exit_stack = AsyncExitStack()


def replace_outbound(connection: Connection) -> None:
    class Mine:
        def __init__(self, outbound: Any) -> None:
            self.send_raw_request, self.notify = outbound.send_raw_request, outbound.notify

    connection.outbound = Mine(connection.outbound)


def replace_version(connection: Connection) -> None:
    connection.protocol_version = "2025-06-18"


def replace_client(connection: Connection) -> None:
    assert connection.client_params is not None
    connection.client_params = connection.client_params.model_copy(update={"protocol_version": "mine"})


def replace_capabilities(connection: Connection) -> None:
    connection.client_capabilities = None


CHANGES: list[Callable[[Connection], None]] = [
    set_attribute,
    remove_attribute,
    replace_attribute,
    replace_state,
    mark_state,
    replace_stack,
    replace_outbound,
    replace_version,
    replace_client,
    replace_capabilities,
]


def as_made(connection: Connection) -> bool:
    """Whether nobody changed anything of it."""
    assert connection.client_params is not None
    return (
        not hasattr(connection, "mine")
        and connection.session_id not in (None, "mine")
        and connection.state == {}
        and not hasattr(connection.state, "mine")
        and type(connection.exit_stack) is not AsyncExitStack
        and type(connection.outbound).__name__ != "Mine"
        and connection.protocol_version == "2025-11-25"
        and connection.client_params.protocol_version != "mine"
        and connection.client_capabilities is connection.client_params.capabilities
    )


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_changed_connection_is_not_kept(change: Callable[[Connection], None], memory: MakeStore) -> None:
    """What a handler puts on the `Connection` is there for as long as something runs, and no longer."""
    async with staged(memory) as (stage, a, b, _c):
        seen = looking(stage)

        @stage.tool
        async def keep(ctx: Context, arguments: dict[str, Any]) -> str:
            change(current_connection())
            return "kept"

        session = await a.open()
        await look(b, session)
        await eventually(lambda: is_parked(b, session))
        assert text_of((await b.post(call("keep", 2), session)).json()) == "kept"
        await eventually(lambda: is_forgotten(b, session))
        assert await look(b, session, 3) == "test 2025-11-25 initialized None - {}"
        assert seen[1] is not seen[0]
        assert as_made(seen[1])


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_later_change_reaches_no_request(change: Callable[[Connection], None], memory: MakeStore) -> None:
    """What a handler's own task puts on the `Connection` after the end, while the view is parked."""
    async with staged(memory) as (stage, a, b, _c):
        seen = looking(stage)
        session = await a.open()
        await look(b, session)
        await eventually(lambda: is_parked(b, session))
        change(seen[0])
        assert await look(b, session, 2) == "test 2025-11-25 initialized None - {}"
        assert seen[1] is not seen[0]
        assert as_made(seen[1])


async def test_state_is_parked_by_no_node(either: MakeStore) -> None:
    """P13: user data stay no longer than the request for which they were loaded."""
    async with staged(either) as (stage, a, b, c):
        looking(stage)

        @stage.tool
        async def put(ctx: Context, arguments: dict[str, Any]) -> str:
            current_connection().state["key"] = arguments["value"]
            return "put"

        session = await a.open()
        await look(b, session)
        await eventually(lambda: is_parked(b, session))
        for number, member in enumerate((b, c, b), 2):
            await member.post(call("put", number, value=number), session)
            await eventually(lambda member=member: is_forgotten(member, session))  # type: ignore[misc]
            assert f"{{'key': {number}}}" in await look(b, session, 9)
            await eventually(lambda: is_forgotten(b, session))


async def test_late_state_reaches_no_request(memory: MakeStore) -> None:
    """It is not saved either, as that of any task which outlasts its request."""
    async with staged(memory) as (stage, a, b, c):
        seen = looking(stage)
        session = await a.open()
        await look(b, session)
        await eventually(lambda: is_parked(b, session))
        seen[0].state["key"] = "late"
        assert (await look(b, session, 2)).endswith("{}")
        assert (await look(c, session, 3)).endswith("{}")


async def test_owed_clean_up_keeps_its_view(memory: MakeStore) -> None:
    """P6: a view whose `exit_stack` holds something lives until the session ends."""
    async with staged(memory) as (stage, a, b, c):
        seen = looking(stage)

        @stage.tool
        async def owe(ctx: Context, arguments: dict[str, Any]) -> str:
            current_connection().exit_stack.callback(stage.open, "cleaned")
            return "owed"

        session = await a.open()
        await look(b, session)
        await eventually(lambda: is_parked(b, session))
        await b.post(call("owe", 2), session)
        await look(b, session, 3)
        assert seen[1] is seen[0]
        assert session_key(session.id) in node_of(b).sessions
        assert (await c.delete(session)).status_code == 200
        await stage.reached("cleaned")
        await eventually(lambda: is_forgotten(b, session))


# ---- what other nodes do meanwhile


async def change_level(member: Member, store: Store, session: Session) -> None:
    answer = await member.post(request("logging/setLevel", {"level": "error"}, 7), session)
    assert answer.json()["result"] == {}


async def change_client(member: Member, store: Store, session: Session) -> None:
    again = opening("2025-06-18", clientInfo={"name": "renamed", "version": "2"})
    assert "result" in (await member.post(again, session)).json()


async def change_state(member: Member, store: Store, session: Session) -> None:
    await member.post(call("put", 7), session)


async def change_subscriptions(member: Member, store: Store, session: Session) -> None:
    await store.update(session_key(session.id), {subscription_field("a://b"): b"a://b"})


async def initialize(member: Member, store: Store, session: Session) -> None:
    assert (await member.post(notification("notifications/initialized"), session)).status_code == 202


async def lose_initialized(member: Member, store: Store, session: Session) -> None:
    """As a failover that has lost it."""
    await store.update(session_key(session.id), {"initialized": None})


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (change_level, True, "test 2025-11-25 initialized error - {}"),
        (change_client, True, "renamed 2025-06-18 initialized None - {}"),
        (change_state, True, "test 2025-11-25 initialized None - {'key': 1}"),
        (change_subscriptions, True, "test 2025-11-25 initialized None a://b {}"),
        (initialize, False, "test 2025-11-25 initialized None - {}"),
        (lose_initialized, True, "test 2025-11-25 new None - {}"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_foreign_change_shows_at_once(change: Any, before: bool, after: str, either: MakeStore) -> None:
    """P2: both sides on different nodes."""
    async with staged(either) as (stage, a, b, c):
        looking(stage)

        @stage.tool
        async def put(ctx: Context, arguments: dict[str, Any]) -> str:
            current_connection().state["key"] = 1
            return "put"

        session = await a.open(initialized=before)
        said = "initialized" if before else "new"
        assert await look(b, session) == f"test 2025-11-25 {said} None - {{}}"
        await eventually(lambda: is_parked(b, session))
        await change(c, stage.store, session)
        for number in (2, 3):
            assert await look(b, session, number) == after
            await eventually(lambda: session_key(session.id) not in node_of(b).sessions)


async def test_ended_session_is_404_though_parked(make_store: MakeStore) -> None:
    """P1, P6: the store is asked for every request; what it does not have is not kept either."""
    async with staged(make_store) as (stage, a, b, c):
        looking(stage)
        session = await a.open()
        for member in (b, c):
            await look(member, session)
            await eventually(lambda member=member: is_parked(member, session))  # type: ignore[misc]
        assert (await c.delete(session)).status_code == 200
        assert is_forgotten(c, session)
        assert (await b.post(call("look", 2), session)).status_code == 404
        assert is_forgotten(b, session)


async def test_cancel_meanwhile_is_heeded(make_store: MakeStore) -> None:
    """P5: it came to another node, and its request to the parked view."""
    async with staged(make_store) as (stage, a, b, c):
        looking(stage)
        session = await a.open()
        await look(b, session)
        await eventually(lambda: is_parked(b, session))
        await c.post(cancel(7), session)
        assert "cancelled" in (await look(b, session, 7)).lower()
        assert "initialized" in await look(b, session, 8)


async def test_message_to_follower_unparks_nothing(memory: MakeStore) -> None:
    """P10: no log is followed for a parked view."""
    async with staged(memory, window=0.01) as (stage, a, b, _c):
        looking(stage)

        @stage.tool
        async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("waits")
            await stage.door("go on")
            return "waited"

        session = await a.open()
        await look(b, session)
        await eventually(lambda: is_parked(b, session))
        # With one whose log was followed nothing is parked: cancels may have come by it.
        waiting = asyncio.create_task(b.post(call("wait", 2), session))
        await stage.reached("waits")
        await eventually(lambda: bool(node_of(b).sessions[session_key(session.id)].log.follower.subscriptions))
        stage.open("go on")
        await waiting
        await eventually(lambda: is_forgotten(b, session))


async def test_long_record_is_not_parked(memory: MakeStore) -> None:
    """P10: by no client can a node's memory be filled."""
    async with staged(memory) as (stage, a, b, _c):
        looking(stage)
        session = await a.open(capabilities={"experimental": {"long": {"text": "x" * 4096}}})
        await look(b, session)
        for member in (a, b):
            await eventually(lambda member=member: is_forgotten(member, session))  # type: ignore[misc]
        assert not node_of(a).sessions.parked


# ---- sessions that one node holds


async def test_held_session_is_parked_nowhere(make_store: MakeStore) -> None:
    """Neither where it is held nor where its requests are relayed."""
    async with staged(make_store, placement="owner") as (stage, a, b, c):
        seen = looking(stage)
        session = await a.open()
        for number, member in enumerate((b, a, c, a)):
            await look(member, session, number)
        for member in (b, c):
            await eventually(lambda member=member: is_forgotten(member, session))  # type: ignore[misc]
        assert session_key(session.id) in node_of(a).sessions
        assert len({id(connection) for connection in seen}) == 1
