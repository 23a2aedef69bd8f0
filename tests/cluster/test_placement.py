"""A session that one node holds, with `placement="owner"`, behind requests that go to any node."""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import mcp_types as types
import pydantic_core
import pytest
from mcp.server import MCPServer, Server
from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.settings import AuthSettings
from mcp.server.connection import Connection
from mcp.server.mcpserver import Context as ToolContext
from mcp_types import INTERNAL_ERROR, ErrorData
from pydantic import AnyHttpUrl

import nonstick
from nonstick import current_attempt, current_connection
from nonstick.commands.application import application
from nonstick.commands.serve_options import ServeOptions
from nonstick.core.events import Kind, decode, draft, kind_of
from nonstick.core.names import session_key
from nonstick.core.record import LOST, OWNER
from nonstick.core.settings import Options
from nonstick.errors import ConfigurationError, SessionNotFound
from nonstick.session.exchange import Exchange
from nonstick.store import MAX_READ, NEW_STREAM, Batch, Cursor
from nonstick.stores.encrypted import EncryptedStore
from nonstick.stores.memory import MemoryStore
from nonstick.stores.sqlite import SQLiteStore
from nonstick.testing.cluster import Cluster, Member, Session
from tests.cluster.conftest import MakeStore, one
from tests.cluster.servers import messages
from tests.cluster.sse import getting, posting
from tests.cluster.stage import (
    Context,
    DownStore,
    Stage,
    accept,
    announce,
    ask,
    call,
    cancel,
    eventually,
    node_of,
    notification,
    say,
    text_of,
    texts_of,
)
from tests.cluster.test_auth import ADA, RESOURCE, Tokens, as_

pytestmark = pytest.mark.anyio


class Page:
    """What JSON cannot hold: it counts how often it was used, and says when it is closed."""

    def __init__(self, used: int = 0) -> None:
        self.used = used


class Desk(Stage):
    """Three nodes, and tools that use a `Page` which only one of them has."""

    def __init__(self, make_store: MakeStore, **options: Any) -> None:
        super().__init__(make_store, placement="owner", **options)
        self.closed: list[Page] = []
        self.tool(self.use)
        self.tool(self.wait)

    def open_page(self, connection: Connection, used: int = 0) -> Page:
        page = connection.state["page"] = Page(used)
        connection.exit_stack.callback(self.closed.append, page)
        return page

    async def use(self, ctx: Context, arguments: dict[str, Any]) -> int:
        """How often this session's page was used."""
        connection = current_connection()
        page = connection.state.get("page") or self.open_page(connection)
        page.used += 1
        return int(page.used)

    async def wait(self, ctx: Context, arguments: dict[str, Any]) -> str:
        """Says what it is told to, waits for its door, and says when it is stopped."""
        name = arguments.get("name", "")
        for text in arguments.get("texts", ()):
            await say(ctx, text)
        self.open(f"running {name}".strip())
        try:
            await self.door(f"go on {name}".strip())
        except asyncio.CancelledError:
            self.open(f"stopped {name}".strip())
            raise
        return f"done {current_attempt()}"

    async def rehydrate(self, connection: Connection) -> None:
        """The page of 100 uses."""
        assert connection is current_connection()
        self.open_page(connection, 100)
        self.open("rehydrated")


Nodes = tuple[Desk, Member, Member, Member]


@asynccontextmanager
async def desk(make_store: MakeStore, *, movable: bool = False, **options: Any) -> AsyncIterator[Nodes]:
    """A desk with three nodes, and the nodes; `movable`: its sessions can be built anew."""

    async def rehydrate(connection: Connection) -> None:
        await stage.rehydrate(connection)

    if movable:
        options["rehydrate"] = rehydrate
    stage = Desk(make_store, **options)
    async with stage:
        a, b, c = stage.cluster
        yield stage, a, b, c


async def use(member: Member, session: Session, id: int = 1) -> int:  # noqa: A002
    """How often the page was used, asked through this node."""
    response = await member.post(call("use", id), session)
    assert response.status_code == 200, response.text
    assert response.headers["mcp-session-id"] == session.id
    # A stream, where building the session anew took longer than the window.
    return int(text_of(messages(response)[-1]))


async def test_unstorable_state_serves_every_node(make_store: MakeStore) -> None:
    """P1: behind a balancer without affinity; each request runs once, on the node that opened the session."""
    async with desk(make_store) as (_, *members):
        session = await members[0].open()
        other = await members[1].open()
        assert [await use(members[n % 3], session, n) for n in range(9)] == list(range(1, 10))
        assert [await use(members[n % 3], other, n) for n in range(3)] == [1, 2, 3]


async def test_requests_run_together_on_owner(make_store: MakeStore) -> None:
    """P1: none waits for another."""
    async with desk(make_store) as (stage, *members):
        arrived: set[str] = set()

        @stage.tool
        async def meet(ctx: Context, arguments: dict[str, Any]) -> int:
            arrived.add(arguments["name"])
            if len(arrived) == len(members):
                stage.open("all")
            await stage.door("all")
            return id(current_connection())

        session = await members[0].open()
        answers = await asyncio.gather(
            *(member.post(call("meet", n, name=str(n)), session) for n, member in enumerate(members))
        )
        assert len({text_of(answer.json()) for answer in answers}) == 1


async def test_relayed_call_asks_through_third_node(make_store: MakeStore) -> None:
    """P4: the handler waits on a, the client is connected to b and replies to c."""
    async with desk(make_store) as (stage, _, b, c):

        @stage.tool
        async def greet(ctx: Context, arguments: dict[str, Any]) -> str:
            return str((await ask(ctx))["content"]["name"])

        session = await stage.cluster[0].open(capabilities={"elicitation": {}})
        async with posting(b, session, call("greet")) as stream:
            request = await stream.message()
            assert (await c.post(accept(request, "Ada"), session)).status_code == 202
            assert texts_of(await stream.rest()) == ["Ada"]


async def test_relayed_call_is_cancelled_elsewhere(make_store: MakeStore) -> None:
    """P5: from a third node."""
    async with desk(make_store, window=0.05) as (stage, a, b, c):
        session = await a.open()
        async with posting(b, session, call("wait", "w", texts=["0"])) as stream:
            assert text_of(await stream.message()) == "0"
            assert (await c.post(cancel("w"), session)).status_code == 202
            await stage.reached("stopped")
            [end] = await stream.rest()
            assert end == {"jsonrpc": "2.0", "id": "w", "error": {"code": -32800, "message": "Request cancelled"}}


async def test_relayed_stream_is_resumed_elsewhere(make_store: MakeStore) -> None:
    """P3: the rest of it, then the live tail, then the end."""
    async with desk(make_store) as (stage, a, b, c):
        session = await a.open()
        async with posting(b, session, call("wait", texts=["0", "1"])) as stream:
            assert [text_of(await stream.message()) for _ in range(2)] == ["0", "1"]
            first = stream.last_id
        async with getting(c, session, first) as resumed:
            stage.open("go on")
            assert texts_of(await resumed.rest()) == ["done 1"]
            assert resumed.last_id
        async with getting(a, session, first) as resumed:
            assert texts_of(await resumed.rest()) == ["done 1"]


async def test_relayed_answer_takes_owners_form(memory: MakeStore) -> None:
    """P3: JSON if the result comes first and soon, else a primed stream."""
    async with desk(memory, window=0.1) as (stage, a, b, _):
        session = await a.open()
        for member in (a, b):
            async with posting(member, session, call("wait", member.name, name=member.name)) as stream:
                priming = await stream.event()
                assert priming.id
                assert priming.retry == 1000
                stage.open(f"go on {member.name}")
                assert texts_of(await stream.rest()) == ["done 1"]


@pytest.mark.parametrize(("answer", "kind"), [("sse", "text/event-stream"), ("json", "application/json")])
async def test_relayed_call_keeps_chosen_answer(memory: MakeStore, answer: str, kind: str) -> None:
    async with desk(memory, answer=answer, window=0.05) as (stage, a, b, _):
        session = await a.open()
        async with posting(b, session, call("wait", texts=[])) as stream:
            await stage.reached("running")
            if answer == "json":
                # The window passes, and it is still no stream.
                await eventually(lambda: bool(node_of(b).services.readers))
                assert not stream.started
            stage.open("go on")
            assert (await stream.response()).headers["content-type"].startswith(kind)
            assert text_of(await stream.outcome()) == "done 1"


async def test_old_client_gets_relayed_answers(memory: MakeStore) -> None:
    """P3: one that cannot parse a priming event."""
    async with desk(memory, window=0.05) as (stage, a, b, _):
        session = await a.open(version="2025-03-26")
        async with posting(b, session, call("wait", texts=["0"])) as stream:
            assert (await stream.event()).message["params"]["data"] == "0"
            stage.open("go on")
            assert texts_of(await stream.rest()) == ["done 1"]


async def test_running_request_id_is_refused_everywhere(memory: MakeStore) -> None:
    async with desk(memory, window=0.05) as (stage, a, b, c):
        session = await a.open()
        async with posting(b, session, call("wait", 7)) as stream:
            await stage.reached("running")
            assert (await b.post(call("use", 7), session)).status_code == 409
            assert (await a.post(call("use", 7), session)).status_code == 409
            refused = (await c.post(call("use", 7), session)).json()
            assert "still running" in refused["error"]["message"]
            stage.open("go on")
            assert text_of(await stream.outcome()) == "done 1"


async def test_owners_announcement_reaches_other_listeners(memory: MakeStore) -> None:
    """P3: the standalone stream is any node's, as ever."""
    async with desk(memory) as (stage, a, b, c):

        @stage.tool
        async def tell(ctx: Context, arguments: dict[str, Any]) -> str:
            await announce(ctx, "news")
            return "told"

        session = await a.open()
        async with getting(c, session) as listener:
            assert text_of(messages(await b.post(call("tell"), session))[-1]) == "told"
            assert text_of(await listener.message()) == "news"


async def test_notifications_handler_runs_on_owner(memory: MakeStore) -> None:
    """P1: whichever node the notification came to."""
    where: list[Any] = []

    class Roots(Desk):
        def server(self) -> Server[Any]:
            server = super().server()

            async def changed(ctx: Context, params: Any) -> None:
                where.append(current_connection().state["page"])
                self.open("heard")

            server.add_notification_handler("notifications/roots/list_changed", types.NotificationParams, changed)
            return server

    async with Roots(memory) as stage:
        a, b, _ = stage.cluster
        session = await a.open()
        assert await use(b, session) == 1
        assert (await b.post(notification("notifications/roots/list_changed"), session)).status_code == 202
        await stage.reached("heard")
        assert [page.used for page in where] == [1]


async def test_initialization_elsewhere_reaches_the_owner(memory: MakeStore) -> None:
    """P2."""
    async with desk(memory) as (stage, a, b, _):

        @stage.tool
        async def ready(ctx: Context, arguments: dict[str, Any]) -> bool:
            return current_connection().initialized.is_set()

        session = await a.open(initialized=False)
        assert (await b.post(notification("notifications/initialized"), session)).status_code == 202
        assert text_of((await b.post(call("ready"), session)).json()) == "True"


async def test_delete_anywhere_cleans_up_once(make_store: MakeStore) -> None:
    """P6: what runs is stopped, the id is 404 everywhere."""
    async with desk(make_store, window=0.05) as (stage, *members):
        session = await members[0].open()
        assert await use(members[1], session) == 1
        async with posting(members[1], session, call("wait", texts=["0"])) as stream:
            await stream.message()
            assert (await members[2].delete(session)).status_code == 200
            for member in members:
                assert (await member.post(call("use"), session)).status_code == 404
            await stage.reached("stopped")
            assert "ended" in texts_of(await stream.rest())[0]
        await eventually(lambda: [page.used for page in stage.closed] == [1])
        await eventually(lambda: not node_of(members[0]).sessions)


async def test_idle_session_stays_on_owner_alone(memory: MakeStore) -> None:
    """P10: the other nodes forget it."""
    async with desk(memory) as (_, a, b, c):
        session = await a.open()
        assert [await use(member, session) for member in (b, c)] == [1, 2]
        await eventually(lambda: not node_of(b).sessions and not node_of(c).sessions)
        assert list(node_of(a).sessions) == [session_key(session.id)]
        assert not node_of(a).sessions[session_key(session.id)].users


# ---- drain


async def test_idle_session_leaves_draining_owner(make_store: MakeStore) -> None:
    """P8: with `rehydrate`, at once; its clean-up ran on the node that goes, before."""
    async with desk(make_store, movable=True) as (stage, a, b, c):
        session = await a.open()
        assert await use(b, session) == 1
        a.app.manager.begin_drain()
        await eventually(lambda: len(stage.closed) == 1)
        assert [await use(member, session, n) for n, member in enumerate((c, b, c, b))] == [101, 102, 103, 104]
        assert [page.used for page in stage.closed] == [1]


async def test_busy_session_moves_when_idle(memory: MakeStore) -> None:
    """P8: until then what arrives runs where the state is."""
    async with desk(memory, movable=True, window=0.05, grace=10.0) as (stage, a, b, c):
        session = await a.open()
        assert await use(b, session) == 1
        async with posting(b, session, call("wait", texts=["0"])) as stream:
            await stream.message()
            a.app.manager.begin_drain()
            assert await use(c, session, 2) == 2
            stage.open("go on")
            assert texts_of(await stream.rest()) == ["done 1"]
        await stage.cluster[0].stop()
        assert await use(c, session, 3) == 101


async def test_requests_during_move_are_answered_once(memory: MakeStore) -> None:
    """P8: no client sees the drain."""
    async with desk(memory, movable=True) as (_, a, b, c):
        session = await a.open()
        sent = 0

        async def keep_using(member: Member, first: int) -> list[int]:
            nonlocal sent
            found: list[int] = []
            while len(found) < 5 or found[-1] < 100:
                sent += 1
                answer = await member.post(call("use", first + len(found)), session)
                found.append(int(await _outcome(answer)))
            return found

        users = [asyncio.create_task(keep_using(member, n * 10_000)) for n, member in enumerate((b, c), 1)]
        await eventually(lambda: sent > 4)
        a.app.manager.begin_drain()
        counts = sorted(count for user in await asyncio.gather(*users) for count in user)
        before = [count for count in counts if count < 100]
        after = [count for count in counts if count > 100]
        assert before == list(range(1, len(before) + 1))
        assert after == list(range(101, 101 + len(after)))
        assert len(counts) == sent


async def test_unbuildable_session_ends_with_its_node(make_store: MakeStore) -> None:
    """P6, P8: with its clean-up."""
    async with desk(make_store) as (stage, a, b, c):
        session = await a.open()
        assert await use(b, session) == 1
        async with getting(c, session) as listener:
            await a.stop()
            assert [page.used for page in stage.closed] == [1]
            assert await listener.rest() == []
        for member in (b, c):
            assert (await member.post(call("use"), session)).status_code == 404


async def test_idless_client_keeps_its_relay(memory: MakeStore) -> None:
    """P8: the node that relays drains, and the client has no event id."""
    async with desk(memory, window=5.0) as (stage, a, b, _):
        session = await a.open(version="2025-03-26")
        async with posting(b, session, call("wait")) as stream:
            await stage.reached("running")
            b.app.manager.begin_drain()
            stage.open("go on")
            assert text_of(await stream.answer()) == "done 1"


async def test_relay_outlasting_grace_ends_with_error(memory: MakeStore) -> None:
    """P8: as a request that runs there would."""
    async with desk(memory, window=5.0, grace=0.2) as (stage, a, b, _):
        session = await a.open(version="2025-03-26")
        async with posting(b, session, call("wait")) as stream:
            await stage.reached("running")
            b.app.manager.begin_drain()
            assert (await stream.answer())["error"]["data"]["reason"] == "node_shut_down"


# ---- lost owners: tests/faults/test_owner_death.py kills and freezes them


async def lose(stage: Stage, session: Session, owner: Member) -> None:
    """The session is held by a node that is not there any more, as the one that opened it has found out."""
    key = session_key(session.id)
    held = node_of(owner).placement.held.get(key)
    assert held is not None
    await stage.store.update(key, {OWNER: b"gone-00000000"})
    assert await held.look()
    await eventually(lambda: key not in node_of(owner).sessions)


async def test_lost_owners_session_is_rebuilt_once(make_store: MakeStore) -> None:
    """P7: whichever nodes' requests find it out."""
    async with desk(make_store, movable=True) as (stage, a, b, c):
        session = await a.open()
        await lose(stage, session, a)
        answers = await asyncio.gather(*(member.post(call("use", n), session) for n, member in enumerate((b, c, b))))
        found = [await _outcome(answer) for answer in answers]
        assert sorted(found) == ["101", "102", "103"]


async def test_lost_owners_unread_requests_end(memory: MakeStore) -> None:
    """P7, P10: what the new owner ends is what the lost one ran, and nothing that another node runs."""
    async with desk(memory, movable=True) as (stage, a, b, c):
        session = await a.open()
        lost = await left_open(stage, session, "gone-00000000", 1)
        elsewhere = await left_open(stage, session, node_of(c).services.node_id, 2)
        await lose(stage, session, a)
        assert await _outcome(await b.post(call("use", 3), session)) == "101"
        ends = {
            event.stream: decode(event.data)
            for event in await stage.log(session)
            if kind_of(event.data) is Kind.TERMINAL
        }
        assert ends[lost]["id"] == 1
        assert ends[lost]["error"]["data"] == {"reason": "node_lost", "retrySafe": False}
        assert elsewhere not in ends
        # Said in the log, for an owner of old and for whoever waits for one.
        owners = [decode(event.data)["node"] for event in await stage.log(session) if kind_of(event.data) is Kind.OWNER]
        assert owners == [node_of(b).services.node_id]


async def left_open(stage: Stage, session: Session, node: str, request: int) -> int:
    """A stream that this node opened, whose client is gone."""
    event = draft(Kind.OPENED, pydantic_core.to_json({"node": node, "attempt": 1, "request": call("wait", request)}))
    batch = Batch([event], writer=secrets.token_hex(4), sequence=1, stream=NEW_STREAM)
    return (await stage.store.append(session_key(session.id), batch)).first


async def test_unbuildable_lost_session_ends_clearly(make_store: MakeStore) -> None:
    """P7: then 404, which says why for a while."""
    async with desk(make_store) as (stage, a, b, c):
        session = await a.open()
        await lose(stage, session, a)
        outcome = messages(await b.post(call("use"), session))[-1]
        assert "is gone" in outcome["error"]["message"]
        assert outcome["error"]["data"] == {"reason": "session_lost", "retrySafe": True}
        gone = await c.post(call("use"), session)
        assert gone.status_code == 404
        assert "Open a new session" in gone.json()["error"]["message"]


async def test_lost_session_is_logged_and_removed(memory: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """P6, P7, P10: its clients have some seconds to read the ends of their streams."""
    monkeypatch.setattr("nonstick.node.placement._LINGER", 0.2)
    told: list[Any] = []
    async with desk(memory) as (stage, a, b, _):
        session = await a.open()
        running = await left_open(stage, session, "gone-00000000", 1)
        stage.store.watch(session_key(session.id), told.append)
        await lose(stage, session, a)
        assert "is gone" in await _outcome(await b.post(call("use", 2), session))

        async def is_gone() -> bool:
            try:
                await stage.store.load(session_key(session.id))
            except SessionNotFound:
                return True
            return False

        await eventually(is_gone)
    events = [event for news in told if news is not None for event in news.events]
    owners = [decode(event.data)["node"] for event in events if kind_of(event.data) is Kind.OWNER]
    ends = [event for event in events if event.stream == running and kind_of(event.data) is Kind.TERMINAL]
    assert owners == [LOST]
    assert [decode(event.data)["error"]["data"]["reason"] for event in ends] == ["session_lost"]


async def test_owner_passes_over_unreadable_owners(memory: MakeStore, caplog: pytest.LogCaptureFixture) -> None:
    """P12: whatever wrote them, they keep no relayed request from being run."""
    async with desk(memory) as (stage, a, b, _):
        session = await a.open()
        bad = [draft(Kind.OWNER, body) for body in (b"not JSON", b"[]", b"{}")]
        await stage.store.append(session_key(session.id), Batch(bad))
        assert await use(b, session) == 1
    assert len([record for record in caplog.records if "passed over" in record.message]) == len(bad)


async def test_old_owner_runs_nothing_relayed(make_store: MakeStore) -> None:
    """P7: not even what it takes before it hears that another node is the owner; it runs its clean-up then."""
    async with desk(make_store) as (stage, a, b, _):
        session = await a.open()
        assert await use(b, session) == 1
        await stage.store.update(session_key(session.id), {OWNER: node_of(b).services.node_id.encode()})
        outcome = messages(await stage.cluster[2].post(call("use"), session))[-1]
        assert outcome["error"]["data"]["retrySafe"] is True
        await eventually(lambda: [page.used for page in stage.closed] == [1])
        assert not node_of(a).sessions


async def test_half_ended_lost_session_is_ended(memory: MakeStore) -> None:
    """P6: also if the node that found it lost was lost itself."""
    async with desk(memory) as (stage, a, b, _):
        session = await a.open()
        await a.stop()
        session = await b.open()
        key = session_key(session.id)
        await stage.store.update(key, {OWNER: LOST.encode()})
        assert (await stage.cluster[2].post(call("use"), session)).status_code == 404
        await eventually(lambda: node_of(stage.cluster[2]).placement._working == {})


async def test_failed_rebuilding_is_tried_again(memory: MakeStore) -> None:
    """P7, P9: `rehydrate` failed once; nothing of what it raised is told."""
    tries = 0

    async def rehydrate(connection: Connection) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise RuntimeError("no display on host-7")
        connection.state["page"] = Page(200)

    stage = Desk(memory, rehydrate=rehydrate)
    async with stage:
        a, b, c = stage.cluster
        session = await a.open()
        a.app.manager.begin_drain()
        await eventually(lambda: not node_of(a).sessions)
        answer = (await b.post(call("use"), session)).json()
        assert answer["error"]["data"] == {"reason": "session_not_rebuilt", "retrySafe": True}
        assert "host-7" not in str(answer)
        assert await use(c, session, 2) == 201


async def _outcome(response: Any) -> str:
    return str(text_of(messages(response)[-1]))


# ---- who sends


def secured() -> MCPServer[Any]:
    auth = AuthSettings(
        issuer_url=AnyHttpUrl("https://issuer.example"),
        resource_server_url=AnyHttpUrl(RESOURCE),
        required_scopes=["use"],
        validate_token_resource=True,
    )
    server = MCPServer[Any]("secured", token_verifier=Tokens(), auth=auth)

    @server.tool()
    def who(ctx: ToolContext) -> list[Any]:
        token, request = get_access_token(), ctx.request_context.request
        assert token is not None
        assert request is not None
        names = ("authorization", "cookie", "x-api-key", "accept-language", "mcp-session-id")
        headers = {name for name in names if name in request.headers}
        return [token.client_id, token.subject, token.token, request.user.display_name, sorted(headers)]

    @server.tool()
    def what(name: str, ctx: ToolContext) -> list[Any]:
        request = ctx.request_context.request
        assert request is not None
        return [request.headers.get(name), request.url.query]

    return server


async def test_relayed_sender_is_seen_without_secrets(memory: MakeStore) -> None:
    """P13: on every node alike, and no token or session id is in the log."""
    async with Cluster(secured, memory, placement="owner") as cluster:
        session = await cluster[0].open(authorization=ADA)
        more = {"cookie": "c=crumbs", "x-api-key": "key", "accept-language": "tlh"}
        seen = []
        for member in cluster:
            answer = (await member.post(call("who"), as_(session, "Bearer ada-2"), **more)).json()
            seen.append(answer["result"]["structuredContent"]["result"])
        assert seen == [["app", "ada", "", "app", ["accept-language", "mcp-session-id"]]] * 3
        assert (await cluster[1].post(call("who"), as_(session, "Bearer bob"))).status_code == 404
        log = b"".join(event.data for event in await memory().read(session_key(session.id), Cursor(0), limit=MAX_READ))
        assert b"tlh" in log
        assert not [secret for secret in (b"ada-2", b"crumbs", session.id.encode()) if secret in log]


SECRETS = {
    name: f"secret-of-{name}"
    for name in ("x-api-key", "x-amzn-oidc-data", "x-forwarded-access-token", "cookie", "mcp-token", "forwarded")
}
QUERY = "secret-of-the-query"


async def tell_secrets(cluster: Cluster) -> list[Any]:
    """A request to each node, and a notification, with credentials in all places; what the handlers saw."""
    session = await cluster[0].open(authorization=ADA)
    seen = []
    for member in cluster:
        member.url += f"?token={QUERY}"
        answer = await member.post(call("what", name="x-api-key"), as_(session, "Bearer ada-2"), **SECRETS)
        seen.append(answer.json()["result"]["structuredContent"]["result"])
        notice = notification("notifications/roots/list_changed")
        assert (await member.post(notice, as_(session, "Bearer ada-2"), **SECRETS)).status_code == 202
    return seen


def on_disk(home: Path) -> bytes:
    return b"".join(file.read_bytes() for file in home.iterdir())


async def test_store_holds_no_credentials(tmp_path: Path) -> None:
    """P13: whatever header it is in, or the query; and on the owner handlers see no more than elsewhere."""
    async with Cluster(secured, lambda: SQLiteStore(tmp_path / "s.db"), nodes=2, placement="owner") as cluster:
        assert await tell_secrets(cluster) == [[None, ""]] * 2
        stored = on_disk(tmp_path)
    assert b"root/list_changed" in stored.replace(b"roots", b"root")
    assert not [secret for secret in (*SECRETS.values(), QUERY, "ada-2") if secret.encode() in stored]


async def test_wanted_credentials_are_stored_encrypted(tmp_path: Path) -> None:
    """P13: by the names that were asked for, in any case; the others are not there."""
    options: Options = {
        "relay_headers": ["X-Api-Key"],
        "relay_query": True,
        "encryption_keys": [secrets.token_bytes(32)],
        "placement": "owner",
    }
    make = functools.partial(SQLiteStore, tmp_path / "s.db")
    async with Cluster(secured, make, nodes=2, **options) as cluster:
        assert await tell_secrets(cluster) == [[SECRETS["x-api-key"], f"token={QUERY}"]] * 2
        stored = on_disk(tmp_path)
    assert not [secret for secret in (*SECRETS.values(), QUERY, "ada-2") if secret.encode() in stored]


@pytest.mark.parametrize("asked", [{"relay_headers": ["x-api-key"]}, {"relay_query": True}])
def test_unencrypted_store_gets_no_credentials(asked: Any) -> None:
    """P13: that is refused where the app is made."""
    key = secrets.token_bytes(32)
    unencrypted: list[Any] = [None, ["plaintext", key]]
    for keys in unencrypted:
        with pytest.raises(ConfigurationError, match="give encryption_keys= too"):
            nonstick.app(secured(), store="memory:", encryption_keys=keys, **asked)
    nonstick.app(secured(), store="memory:", encryption_keys=[key, "plaintext"], **asked)
    nonstick.app(secured(), store=EncryptedStore(MemoryStore(), [key]), **asked)


@pytest.mark.parametrize("names", ["x-api-key", [""], [1], ["x key"], ["Mcp-Session-Id"], None])
def test_bad_header_list_is_refused(names: Any) -> None:
    with pytest.raises(ConfigurationError, match="relay_headers"):
        nonstick.app(secured(), store="memory:", relay_headers=names)
    with pytest.raises(ConfigurationError, match="True or False"):
        nonstick.app(secured(), store="memory:", relay_query=names)


# ---- which placement


async def test_placing_anywhere_still_relays_owned_sessions(memory: MakeStore) -> None:
    """P12: what is in the record counts, so that the nodes' setting can be changed one by one."""
    stage = Desk(memory)
    async with stage, Cluster(stage.server, memory, nodes=1) as plain:
        session = await stage.cluster[0].open()
        assert [await use(member, session) for member in (plain[0], stage.cluster[1])] == [1, 2]


@pytest.mark.parametrize("placement", ["any", "stateless", "owner"])
def test_command_line_sets_the_apps_placement(placement: Any) -> None:
    app = application(MCPServer("plain"), ServeOptions(target="", store="memory:", placement=placement))
    manager = app.state.nonstick.managers[0]
    assert manager.settings.placement == placement
    assert manager.stateless == (placement == "stateless")


async def test_without_sessions_every_request_stands_alone(memory: MakeStore) -> None:
    """`placement="stateless"` is `stateless_http=True`."""
    async with Cluster(lambda: MCPServer("plain"), memory, placement="stateless") as cluster:
        answer = await cluster[0].post({"jsonrpc": "2.0", "id": 1, "method": "tools/list"})
        assert answer.status_code == 200
        assert "mcp-session-id" not in answer.headers


async def test_relayed_request_is_one_logged_stream(memory: MakeStore) -> None:
    """The log is the only way between nodes; one that the owner answers itself at once is not in it."""
    async with desk(memory) as (stage, a, b, _):
        session = await a.open()
        assert await use(a, session) == 1
        before = await stage.kinds(session)
        assert Kind.OPENED not in before
        assert await use(b, session) == 2
        assert (await stage.kinds(session))[len(before) :] == [Kind.OPENED, Kind.TAKEN, Kind.TERMINAL]


async def test_initialize_leaves_its_state_usable() -> None:
    """P2: a middleware may open what the session holds before its first request."""

    class Prepared(Desk):
        def server(self) -> Server[Any]:
            server = super().server()

            async def prepare(ctx: Any, call_next: Any) -> Any:
                if ctx.method == "initialize":
                    self.open_page(current_connection(), 10)
                return await call_next(ctx)

            server.middleware.append(prepare)
            return server

    async with Prepared(one(MemoryStore())) as stage:
        a, b, _ = stage.cluster
        session = await a.open()
        assert text_of(messages(await a.post(call("use", 1), session))[-1]) == "11"
        assert text_of(messages(await b.post(call("use", 2), session))[-1]) == "12"


async def test_stopped_handler_still_finds_its_state() -> None:
    """P6: what it holds is for its own clean-up, too."""
    async with desk(one(MemoryStore())) as (stage, a, _, _):
        found: list[Any] = []

        @stage.tool
        async def hold(ctx: Context, arguments: dict[str, Any]) -> str:
            current_connection().state["page"] = page = object()
            stage.open("holding")
            try:
                await stage.door("never")
            finally:
                found.append(current_connection().state.get("page") is page)
                stage.open("cleaned up")
            return "never"

        session = await a.open()
        async with posting(a, session, call("hold")):
            await stage.reached("holding")
            assert (await a.delete(session)).status_code == 200
            await stage.reached("cleaned up")
        assert found == [True]


async def test_request_of_moved_session_is_answered() -> None:
    """P7, P9: the store is away when the request is to become a stream, and has given the session to another since."""
    downs: list[DownStore] = []
    make_one = one(MemoryStore())

    def make_store() -> Any:
        downs.append(DownStore(make_one(), "append", after=False))
        return downs[-1]

    async with desk(make_store, window=0.05) as (stage, a, _, _):
        session = await a.open()
        for down in downs:
            down.holding = True
        async with posting(a, session, call("wait")) as stream:
            await stage.reached("running")
            view = node_of(a).sessions[session_key(session.id)]
            (exchange,) = view.exchanges.values()
            assert isinstance(exchange, Exchange)
            await eventually(lambda: exchange.own_stream().is_in_doubt)
            exchange.fence(ErrorData(code=INTERNAL_ERROR, message="moved"))
            (answer,) = await stream.rest()
            assert answer["id"] == 1
            assert answer["error"]["code"] == INTERNAL_ERROR
        await eventually(lambda: not view.users and not len(node_of(a).services.requests))
        for down in downs:
            down.holding = False
