"""Sessions of something that is no SDK server: it answers with bytes, refuses, and says itself what it speaks."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import pytest
from mcp.server import Server
from mcp.shared.exceptions import MCPError
from mcp_types import InitializeRequestParams, JSONRPCNotification, JSONRPCRequest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from nonstick.app import App
from nonstick.core.events import Kind, kind_of
from nonstick.core.names import session_key
from nonstick.core.record import Record
from nonstick.core.refusals import TOO_MANY_REQUESTS, Refusal
from nonstick.http.manager import SessionManager
from nonstick.session.live import LiveSession as View
from nonstick.session.runner import Call, Runner
from nonstick.store import MAX_READ, Cursor, Store
from nonstick.testing.cluster import Member, Session
from tests.cluster.conftest import MakeStore
from tests.cluster.sse import DEADLINE, getting, posting
from tests.cluster.stage import cancel, eventually, node_of

pytestmark = pytest.mark.anyio

SPOKEN = "2025-06-18"
"""The protocol version that the runner speaks, whatever it is asked for."""

INTRODUCTION = {
    "protocolVersion": SPOKEN,
    "capabilities": {"completions": {}, "experimental": {"forwards": {}}},
    "serverInfo": {"name": "elsewhere", "version": "7"},
    "instructions": "Ask.",
}


def asked(method: str, id: Any = 1, **params: Any) -> dict[str, Any]:  # noqa: A002
    """A request of the client's."""
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": params}


def answered(request: JSONRPCRequest, text: str) -> bytes:
    """An answer as no JSON library of ours writes it: whoever parses it and writes it anew is found out."""
    return b'{"result" : {"text":%s},  "id":%s, "jsonrpc":"2.0"}' % (
        json.dumps(text).encode(),
        json.dumps(request.id).encode(),
    )


class Elsewhere:
    """What all nodes forward to."""

    def __init__(self) -> None:
        self.marks: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.began: list[tuple[str, str]] = []
        """What ran, and on which node."""
        self.full = False
        """It takes no more."""


class Forwarder:
    """The runner of one session, on one node."""

    def __init__(self, elsewhere: Elsewhere, node: str, session: View) -> None:
        self._elsewhere = elsewhere
        self._node = node
        self._session = session
        self._client: InitializeRequestParams | None = None

    async def on_request(self, call: Call) -> Mapping[str, Any] | bytes:
        message = call.message
        if self._elsewhere.full:
            raise Refusal(TOO_MANY_REQUESTS)
        self._elsewhere.began.append((message.method, self._node))
        match message.method:
            case "initialize":
                self._client = InitializeRequestParams.model_validate(message.params, by_name=False)
                return INTRODUCTION
            case "tell":
                await call.notify("notifications/message", {"level": "info", "data": "on its way"})
                await self._elsewhere.marks["go on"].wait()
                return answered(message, "told")
            case "ask":
                reply = await call.ask("roots/list", None)
                return answered(message, str(reply["roots"]))
            case "wait":
                self._elsewhere.marks["waits"].set()
                await self._elsewhere.marks["never"].wait()
                return {}
            case "fail":
                raise MCPError(-32001, "not there")
            case "who":
                return {"version": self._session.record.protocol_version, "agent": _agent(call.request)}
            case _:
                return answered(message, "said")

    async def on_notify(self, message: JSONRPCNotification, request: Request) -> None:
        self._elsewhere.began.append((message.method, self._node))
        self._session.connection.state["noticed"] = _agent(request)
        self._elsewhere.marks["noticed"].set()

    def handshake(self) -> tuple[str, InitializeRequestParams]:
        assert self._client is not None
        return SPOKEN, self._client

    def answers(self, method: str) -> bool:
        return method == "tools/list"

    def heeds(self, method: str) -> bool:
        return True


def _agent(request: Request | None) -> str:
    return "" if request is None else request.headers["user-agent"]


class Forwarding(SessionManager):
    """Serves sessions whose requests are forwarded."""

    def __init__(self, elsewhere: Elsewhere, name: str, store: Store, **options: Any) -> None:
        # Of the server there is no more than its name.
        super().__init__(Server("elsewhere"), store=store, node_name=name, grace=2.0, **options)
        self._elsewhere = elsewhere
        self._name = name

    def runners(self, state: Any) -> Callable[[View], Runner]:
        return lambda session: Forwarder(self._elsewhere, self._name, session)


class Door:
    """The ASGI app of one node."""

    def __init__(self, manager: SessionManager) -> None:
        self.manager = manager
        self._host = Starlette(lifespan=lambda _: manager.run())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self._host if scope["type"] == "lifespan" else self.manager.asgi_app)(scope, receive, send)


@asynccontextmanager
async def forwarding(make_store: MakeStore, **options: Any) -> AsyncIterator[tuple[Elsewhere, Member, Member]]:
    """Two nodes that forward to one place."""
    elsewhere = Elsewhere()
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE):
        a, b = (
            Member(name, cast("App", Door(Forwarding(elsewhere, name, make_store(), **options)))) for name in ("a", "b")
        )
        for member in (a, b):
            await member.start()
            stack.push_async_callback(member.stop)
        try:
            yield elsewhere, a, b
        finally:
            for name in ("go on", "never"):
                elsewhere.marks[name].set()


async def kinds(store: Store, session: Session) -> list[Kind | None]:
    """Of the events in the session's log."""
    return [kind_of(event.data) for event in await store.read(session_key(session.id), Cursor(0), limit=MAX_READ)]


async def test_runner_says_what_was_negotiated(make_store: MakeStore) -> None:
    """P2: its version, capabilities, name and instructions reach the client; the record has its version."""
    async with forwarding(make_store) as (elsewhere, a, b), make_store() as store:
        params = {
            "protocolVersion": "2025-11-25",
            "capabilities": {"roots": {}},
            "clientInfo": {"name": "test", "version": "1"},
        }
        opened = await a.post(asked("initialize", 0, **params))
        assert opened.json() == {"jsonrpc": "2.0", "id": 0, "result": INTRODUCTION}
        session = Session(opened.headers["mcp-session-id"], SPOKEN, {})
        record = Record.from_fields((await store.load(session_key(session.id))).fields)
        assert record.protocol_version == SPOKEN
        assert record.client_params.capabilities.roots is not None
        who = (await b.post(asked("who"), session, **{"user-agent": "teller"})).json()["result"]
        assert who == {"version": SPOKEN, "agent": "teller"}
        assert elsewhere.began == [("initialize", "a"), ("who", "b")]


async def test_byte_answer_is_sent_unchanged(make_store: MakeStore) -> None:
    async with forwarding(make_store) as (_, a, b):
        session = await a.open()
        response = await b.post(asked("say", "one"), session)
        assert response.content == answered(JSONRPCRequest(jsonrpc="2.0", id="one", method="say"), "said")
        error = (await b.post(asked("fail", 2), session)).json()["error"]
        assert error == {"code": -32001, "message": "not there"}


async def test_byte_stream_is_resumed_elsewhere(make_store: MakeStore) -> None:
    """P3: live, and once more when all is over."""
    async with forwarding(make_store) as (elsewhere, a, b), make_store() as store:
        session = await a.open()
        async with posting(a, session, asked("tell", 7)) as stream:
            first = await stream.event()
            # No priming before it: the version that the runner speaks knows none.
            assert first.message["params"]["data"] == "on its way"
        async with getting(b, session, first.id) as rest:
            elsewhere.marks["go on"].set()
            (last,) = await rest.events()
            told = answered(JSONRPCRequest(jsonrpc="2.0", id=7, method="tell"), "told")
            assert last.data == told.decode()
        async with getting(b, session, first.id) as again:
            (same,) = await again.events()
            assert (same.id, same.data) == (last.id, last.data)
        assert (await kinds(store, session)) == [Kind.OPENED, Kind.MESSAGE, Kind.TERMINAL]


async def test_runner_asks_through_another_node(make_store: MakeStore) -> None:
    """P4."""
    async with forwarding(make_store) as (_, a, b):
        session = await a.open()
        async with posting(a, session, asked("ask", 3)) as stream:
            question = await stream.message()
            assert question["method"] == "roots/list"
            reply = {"jsonrpc": "2.0", "id": question["id"], "result": {"roots": ["here"]}}
            assert (await b.post(reply, session)).status_code == 202
            assert (await stream.rest())[-1]["result"] == {"text": "['here']"}


async def test_cancel_elsewhere_stops_the_runner(make_store: MakeStore) -> None:
    """P5."""
    async with forwarding(make_store, window=0.02) as (elsewhere, a, b):
        session = await a.open()
        async with posting(a, session, asked("wait", 4)) as stream:
            await elsewhere.marks["waits"].wait()
            assert (await b.post(cancel(4), session)).status_code == 202
            assert (await stream.outcome())["error"]["message"] == "Request cancelled"


async def test_refusal_reaches_client_as_status(make_store: MakeStore) -> None:
    """Nothing ran, nothing is in the log, and the session goes on."""
    async with forwarding(make_store) as (elsewhere, a, b), make_store() as store:
        session = await a.open()
        before = await kinds(store, session)
        elsewhere.full = True
        refused = await b.post(asked("say"), session)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.headers["mcp-session-id"] == session.id
        assert refused.json()["error"]["message"] == TOO_MANY_REQUESTS.message
        elsewhere.full = False
        assert await kinds(store, session) == before
        assert (await b.post(asked("say"), session)).json()["result"] == {"text": "said"}


async def test_refusal_inside_stream_is_error(make_store: MakeStore) -> None:
    """P16: its status is out by then."""
    async with forwarding(make_store, answer="sse") as (elsewhere, a, b):
        session = await a.open()
        elsewhere.full = True
        async with posting(b, session, asked("say", 5)) as stream:
            (told,) = await stream.rest()
        assert told["id"] == 5
        assert told["error"] == {"code": TOO_MANY_REQUESTS.code, "message": TOO_MANY_REQUESTS.message}


async def test_refused_initialize_leaves_nothing(make_store: MakeStore) -> None:
    """P2: there is no session, and its id was told nobody."""
    async with forwarding(make_store) as (elsewhere, a, _):
        elsewhere.full = True
        params = {"protocolVersion": SPOKEN, "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
        refused = await a.post(asked("initialize", 0, **params))
        assert refused.status_code == 429
        assert "mcp-session-id" not in refused.headers
        assert not node_of(a).sessions


async def test_notification_changes_the_runners_state(make_store: MakeStore) -> None:
    """P2: what the runner keeps in the session is there at the other node."""
    async with forwarding(make_store) as (elsewhere, a, b), make_store() as store:
        session = await a.open()
        elsewhere.marks["noticed"].clear()
        note = {"jsonrpc": "2.0", "method": "notifications/x"}
        assert (await b.post(note, session, **{"user-agent": "teller"})).status_code == 202
        await elsewhere.marks["noticed"].wait()
        assert elsewhere.began[-1] == ("notifications/x", "b")

        async def saved() -> bool:
            record = Record.from_fields((await store.load(session_key(session.id))).fields)
            return record.state.get("noticed") == b'"teller"'

        await eventually(saved)
