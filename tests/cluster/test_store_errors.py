"""Whatever a store raises, at whichever call of whichever request: its client gets an answer that is documented.

`docs/errors.md` has the table. Each case is one kind of request, during which one call of the store raises one error,
or hangs, before or after it has done its work; then the fault is over, and the session works. What a store raises and
may not is as if it could not be reached.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import mcp_types as types
import pydantic_core
import pytest
from mcp.server import Server
from mcp.server.request_state import InvalidRequestState

import nonstick
from nonstick.app import App
from nonstick.cluster import cluster
from nonstick.core.event_ids import EventId
from nonstick.core.events import Kind as Kinds
from nonstick.core.events import draft
from nonstick.core.names import session_key
from nonstick.core.refusals import STORE_AWAY
from nonstick.errors import NotPending, SessionNotFound, StoreUnavailable
from nonstick.http import post, sessions
from nonstick.log import cluster_log
from nonstick.log import writer as sender
from nonstick.log.cluster_log import CLUSTER_KEY
from nonstick.node import placement, relay
from nonstick.node.node import Node
from nonstick.session import exchange, inbox, reader, rescue, stream
from nonstick.session.services import Services
from nonstick.store import NEW_STREAM, Batch, Cursor
from nonstick.stores.memory import MemoryStore
from tests.cluster.asgi import DEADLINE, Call
from tests.cluster.commanded import EVERYWHERE, WRITES, CommandedStore, Commands, Fault, every_error
from tests.cluster.stage import Context, announce, ask, call, cancel, eventually, notification, say
from tests.pace import unhurried

pytestmark = pytest.mark.anyio

ERRORS: Final = every_error()
HANG: Final = "hang"
AWAY_SECONDS: Final = 0.45
"""How long a store is away, or hangs, that is so for a time: longer than any call is patient here."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One thing that goes wrong during one kind of request."""

    kind: str
    method: str
    nth: int
    error: str
    after: bool

    def fault(self) -> Fault:
        error = ERRORS.get(self.error)
        lasts = error is None or issubclass(error, StoreUnavailable)
        return Fault(self.method, self.nth, error, self.after, AWAY_SECONDS if lasts else 0.0)

    @property
    def says_gone(self) -> bool:
        """Whether the store says that there is no such session."""
        return self.error == SessionNotFound.__name__

    @property
    def drops_replies(self) -> bool:
        """Whether the store says that nothing waits for what the client sends."""
        return self.error == NotPending.__name__


# ---- the nodes


class _Running:
    """A node's lifespan, in a task of its own, as a server runs it."""

    def __init__(self, app: App) -> None:
        self._started = asyncio.Event()
        self._stopping = asyncio.Event()
        self._task = asyncio.create_task(self._run(app))

    async def _run(self, app: App) -> None:
        async with app.lifespan():
            self._started.set()
            await self._stopping.wait()

    async def started(self) -> None:
        waiting = asyncio.create_task(self._started.wait())
        await asyncio.wait([waiting, self._task], return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            await self._task

    async def stop(self) -> None:
        self._stopping.set()
        await self._task


class World:
    """Two nodes whose stores do as they are told, and the tools of their server."""

    def __init__(self, **options: Any) -> None:
        self.commands = Commands()
        self.memory = MemoryStore()
        self._options = options
        self._running: dict[App, _Running] = {}
        self._doors: dict[str, asyncio.Event] = {}
        self.got: list[str] = []
        """What the subscription buses of the nodes brought."""

    async def __aenter__(self) -> World:
        self.a, self.b = [await self.node() for _ in range(2)]
        return self

    async def __aexit__(self, *error: Any) -> None:
        for app in list(self._running):
            await self.stop(app)

    async def stop(self, app: App) -> None:
        """Stops this node."""
        await self._running.pop(app).stop()

    async def node(self) -> App:
        """One more node."""
        app = nonstick.app(
            self._server(), store=CommandedStore(self.memory, self.commands), window=0.2, grace=0.3, **self._options
        )
        self._running[app] = _Running(app)
        await self._running[app].started()
        node_of(app).services.store.patience = 0.25
        app.cluster.subscription_bus.subscribe(lambda event: self.got.append(type(event).__name__))
        return app

    def _server(self) -> Server[Any]:
        server = Server("commanded", on_list_tools=_no_tools, on_call_tool=self._call)
        server.add_request_handler("resources/list", types.PaginatedRequestParams, _no_resources)
        return server

    async def _call(self, ctx: Context, params: types.CallToolRequestParams) -> types.CallToolResult:
        text = await getattr(self, f"_{params.name}")(ctx, **(params.arguments or {}))
        return types.CallToolResult(content=[types.TextContent(text=str(text))])

    def door(self, name: str) -> asyncio.Event:
        return self._doors.setdefault(name, asyncio.Event())

    # ---- tools

    async def _echo(self, ctx: Context, text: str = "echo") -> str:
        return text

    async def _change(self, ctx: Context) -> str:
        nonstick.current_connection().state["changed"] = True
        return "changed"

    async def _count(self, ctx: Context) -> int:
        count: int = await nonstick.session_state().increment("count")
        return count

    async def _keep(self, ctx: Context, session: str) -> str:
        state = (
            self.a.cluster.session_state_store
            if node_of(self.a).services is _services_here()
            else self.b.cluster.session_state_store
        )
        await state.put(f"{session}:kept", {"value": 1})
        return str(await state.get(f"{session}:kept"))

    async def _say(self, ctx: Context, count: int = 3) -> str:
        for number in range(count):
            await say(ctx, str(number))
        return "said"

    async def _slow(self, ctx: Context) -> str:
        await asyncio.sleep(0.3)
        return "slow"

    async def _hang_up(self, ctx: Context) -> str:
        assert ctx.close_sse_stream is not None
        await say(ctx, "0")
        await ctx.close_sse_stream()
        return "said"

    async def _ask(self, ctx: Context) -> str:
        answer = await ask(ctx)
        return str(answer["content"]["name"])

    async def _progress(self, ctx: Context, door: str) -> str:
        async def on_progress(_progress: float, _total: float | None, _text: str | None) -> None:
            self.door(door).set()

        answer = await ask(ctx, on_progress=on_progress)
        return str(answer["content"]["name"])

    async def _wait(self, ctx: Context, door: str) -> str:
        await say(ctx, "0")
        await self.door(door).wait()
        return "waited"

    async def _tell(self, ctx: Context, text: str) -> str:
        await announce(ctx, text)
        return "told"


def _services_here() -> Services:
    session = nonstick.session.live.current_session()
    assert session is not None
    return session.services


async def _no_tools(ctx: Context, params: Any) -> types.ListToolsResult:
    return types.ListToolsResult(tools=[])


async def _no_resources(ctx: Context, params: Any) -> types.ListResourcesResult:
    return types.ListResourcesResult(resources=[])


def node_of(app: App) -> Node:
    node = app.manager._node
    assert node is not None
    return node


# ---- what a client does


class Client:
    """One client of one session, which tries again what it was told to try again."""

    def __init__(self, world: World, case: Case) -> None:
        self.world = world
        self.case = case
        self.id = ""
        self.headers: dict[str, str] = {}
        self.key = ""
        self.fault = case.fault()
        self.refusals: list[int] = []
        self._calls: list[Call] = []
        self._number = 0

    @property
    def nodes(self) -> tuple[App, App]:
        return self.world.a, self.world.b

    def arm(self) -> None:
        """From here on things go wrong."""
        self.world.commands.counted[self.key].clear()
        self.world.commands.faults[self.key] = self.fault

    async def lift(self) -> None:
        """They do no more."""
        if self.fault.fired.is_set():
            async with asyncio.timeout(DEADLINE):
                await self.fault.lifted.wait()
        self.fault.lifted.set()

    def start(self, node: App, method: str, message: Any = None, last_id: str | None = None) -> Call:
        more = {} if last_id is None else {"last-event-id": last_id}
        started = Call(node, method, {**self.headers, **more}, message)
        self._calls.append(started)
        return started

    def check(self, done: Call) -> bool:
        """Whether the request was served. Fails if it was refused in a way that is not documented."""
        if done.status in (200, 202):
            return True
        self.refusals.append(done.status)
        error = done.json()["error"]
        assert done.json()["id"] is None
        assert "on command" not in error["message"]
        if done.status == 503:
            assert int(done.headers["retry-after"]) > 0
        elif done.status == 404:
            assert self.case.says_gone, error
        else:
            # It is still running, or its place is still taken.
            assert done.status == 409, (done.status, error)
        return False

    async def send(self, node: App, method: str, message: Any = None) -> Call:
        """A request that is repeated until it is served."""
        async with asyncio.timeout(DEADLINE):
            while True:
                sent = self.start(node, method, message)
                await sent.whole()
                if self.check(sent):
                    return sent
                await asyncio.sleep(0.05)

    async def open(self, mark: str = "") -> None:
        """A new session."""
        client, self.headers = {"name": mark or "client", "version": "1"}, {}
        params = {"protocolVersion": "2025-11-25", "capabilities": {"elicitation": {}}, "clientInfo": client}
        opened = await self.send(
            self.world.a, "POST", {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}
        )
        self.id = opened.headers["mcp-session-id"]
        self.key = session_key(self.id)
        self.headers = {"mcp-session-id": self.id, "mcp-protocol-version": "2025-11-25"}

    async def call(self, node: App, tool: str, **arguments: Any) -> Message:
        """Calls a tool, and what comes of it: a result or an error, under its id, once."""
        self._number += 1
        message = call(tool, f"r{self._number}", **arguments)
        async with asyncio.timeout(DEADLINE):
            while True:
                sent = self.start(node, "POST", message)
                await sent.whole()
                if self.check(sent):
                    return await self.outcome(sent, message["id"])
                await asyncio.sleep(0.05)

    async def outcome(self, sent: Call, request: str) -> Message:
        """The answer to a request whose response has ended; comes back for it where it was cut off."""
        if not sent.streams:
            found: Message = sent.json()
            assert found["id"] == request, found
            return found
        messages, last_id, turn = sent.messages, sent.last_id, 0
        async with asyncio.timeout(DEADLINE):
            while not (
                ends := [message for message in messages if message.get("id") == request and "method" not in message]
            ):
                assert last_id is not None, f"a stream without an end or an id: {messages}"
                again = self.start(self.nodes[turn % 2], "GET", last_id=last_id)
                turn += 1
                await again.whole()
                if self.check(again):
                    messages, last_id = messages + again.messages, again.last_id or last_id
                await asyncio.sleep(0.02)
        assert len(ends) == 1, messages
        texts = [m["params"]["data"] for m in messages if m.get("method") == "notifications/message"]
        assert len(texts) == len(set(texts)), f"twice: {messages}"
        assert texts == sorted(texts), f"out of order: {messages}"
        end: Message = ends[0]
        if "result" in end and _text(end) == "said":
            assert len(texts) in (1, 3), f"lost without a word: {messages}"
        return end

    def is_told(self, answer: Message, *texts: str) -> None:
        """Fails unless this is one of these answers, or an error that is documented."""
        assert _is_told(answer, *texts), answer

    async def give_up(self, sent: Call, request: str) -> None:
        """Returns once the response has ended. Where a reply was dropped as one that nobody waits for, by a cancel."""
        if self.case.drops_replies and not sent.ended:
            await self.send(self.world.b, "POST", cancel(request))
        await sent.whole()

    async def works_at(self, node: App) -> None:
        """The session does, on this node."""
        assert _text(await self.call(node, "echo")) == "echo"

    async def works(self) -> None:
        """The session does, on both nodes and both ways."""
        for node in self.nodes:
            await self.works_at(node)
        hears = await self.listen(self.world.b, None)
        await self.call(self.world.a, "tell", text="fence")
        assert await hears.until(lambda: "fence" in _said(hears)), f"not heard: {hears.messages}"
        await hears.close()

    async def listen(self, node: App, last_id: str | None) -> Call:
        """A connection to a stream that was let in."""
        async with asyncio.timeout(DEADLINE):
            while True:
                hears = self.start(node, "GET", last_id=last_id)
                await hears.begun()
                if hears.status == 200:
                    return hears
                await hears.whole()
                self.check(hears)
                await asyncio.sleep(0.05)

    async def leave(self) -> None:
        """Ends the session; nothing of it is left on any node."""
        for open_call in self._calls:
            await open_call.close()
        await self.send_delete()
        for node in map(node_of, self.nodes):
            await eventually(lambda: self.key not in node.sessions)  # noqa: B023

    async def send_delete(self) -> None:
        async with asyncio.timeout(DEADLINE):
            while True:
                sent = self.start(self.world.a, "DELETE")
                await sent.whole()
                if sent.status in (200, 404):
                    return
                self.check(sent)


def _text(message: Message) -> str:
    if "error" in message:
        return f"error: {message['error']['message']}"
    text: str = message["result"]["content"][0]["text"]
    return text


def _said(hears: Call) -> list[str]:
    return [m["params"]["data"] for m in hears.messages if m.get("method") == "notifications/message"]


def _is_told(message: Message, *texts: str) -> bool:
    """Whether this is one of these answers, or an error that says that something of the store failed."""
    if "result" in message:
        return message["result"].get("isError") or not texts or _text(message) in texts
    data = message["error"].get("data") or {}
    if message["error"]["message"] in ("Request cancelled", "The session ended before the request did"):
        return True
    if message["error"]["message"].startswith("Conflict: "):
        # It was answered with 404, and runs: a client that believes the 404 does not ask again.
        return True
    known = {"stream_lost", "state_not_saved", "store_unavailable", "node_lost", "session_lost", "node_shut_down"}
    return data.get("reason") in known or "session store cannot be reached" in message["error"]["message"]


# ---- the kinds of requests

Kind = Callable[[Client], Coroutine[Any, Any, None]]
KINDS: Final[dict[str, Kind]] = {}
OWNED: Final[dict[str, Kind]] = {}
"""Those that are served by relays."""


def kind(function: Kind) -> Kind:
    KINDS[function.__name__] = function
    return function


def relayed(function: Kind) -> Kind:
    OWNED[function.__name__] = function
    return function


@kind
async def initialize(client: Client) -> None:
    mark = f"client-{random.getrandbits(64):x}"
    client.key = mark
    client.world.commands.opening[mark.encode()] = mark
    client.arm()
    await client.open(mark)
    assert set(client.refusals) <= {503}


@kind
async def initialized(client: Client) -> None:
    await client.open()
    client.arm()
    await client.send(client.world.b, "POST", notification("notifications/initialized"))


@kind
@relayed
async def a_notification(client: Client) -> None:
    await client.open()
    client.arm()
    await client.send(client.world.b, "POST", notification("notifications/roots/list_changed"))


@kind
@relayed
async def a_plain_call(client: Client) -> None:
    await client.open()
    client.arm()
    client.is_told(await client.call(client.world.b, "echo", text="plain"), "plain")


@kind
async def a_call_that_changes_state(client: Client) -> None:
    await client.open()
    client.arm()
    client.is_told(await client.call(client.world.b, "change"), "changed")


@kind
@relayed
async def a_slow_call(client: Client) -> None:
    await client.open()
    client.arm()
    client.is_told(await client.call(client.world.b, "slow"), "slow")


@kind
@relayed
async def a_streaming_call(client: Client) -> None:
    await client.open()
    client.arm()
    client.is_told(await client.call(client.world.b, "say"), "said")


@kind
async def a_call_that_closes_its_stream(client: Client) -> None:
    await client.open()
    client.arm()
    client.is_told(await client.call(client.world.b, "hang_up"), "said")


async def _replied(client: Client, *, asks_first: bool) -> None:
    await client.open()
    if not asks_first:
        client.arm()
    sent = client.start(client.world.b, "POST", call("ask", "q"))
    asked = await sent.until(lambda: any("method" in message for message in sent.messages))
    if not asked:
        if client.check(sent):
            assert _is_told(await client.outcome(sent, "q"))
        return
    question = next(message for message in sent.messages if "method" in message)
    if asks_first:
        client.arm()
    result = {"action": "accept", "content": {"name": "Ada"}}
    await client.send(client.world.a, "POST", {"jsonrpc": "2.0", "id": question["id"], "result": result})
    await client.give_up(sent, "q")
    answer = await client.outcome(sent, "q")
    client.is_told(answer, "Ada")


@kind
@relayed
async def a_call_that_asks(client: Client) -> None:
    await _replied(client, asks_first=False)


@kind
@relayed
async def a_reply(client: Client) -> None:
    await _replied(client, asks_first=True)


@kind
async def progress(client: Client) -> None:
    await client.open()
    sent = client.start(client.world.b, "POST", call("progress", "p", door=client.key))
    assert await sent.until(lambda: any("method" in message for message in sent.messages))
    question = next(message for message in sent.messages if "method" in message)
    client.arm()
    token = question["params"]["_meta"]["progressToken"]
    await client.send(client.world.a, "POST", notification("notifications/progress", progressToken=token, progress=1))
    if not (client.case.says_gone or client.case.drops_replies):
        async with asyncio.timeout(DEADLINE):
            await client.world.door(client.key).wait()
    result = {"action": "accept", "content": {"name": "Ada"}}
    await client.send(client.world.a, "POST", {"jsonrpc": "2.0", "id": question["id"], "result": result})
    await client.give_up(sent, "p")
    client.is_told(await client.outcome(sent, "p"), "Ada")


@kind
@relayed
async def a_cancel(client: Client) -> None:
    await client.open()
    sent = client.start(client.world.b, "POST", call("wait", "c", door="never"))
    assert await sent.until(lambda: sent.messages)
    client.arm()
    await client.send(client.world.a, "POST", cancel("c"))
    await sent.whole()
    answer = await client.outcome(sent, "c")
    assert _text(answer) == "error: Request cancelled" or _is_told(answer), answer


@kind
@relayed
async def a_standalone_stream(client: Client) -> None:
    await client.open()
    await client.call(client.world.a, "tell", text="before")
    client.arm()
    hears = await client.listen(client.world.b, None)
    await client.lift()
    await _hears(client, hears, "before")


@kind
async def a_standalone_stream_that_is_resumed(client: Client) -> None:
    await client.open()
    first = await client.listen(client.world.a, None)
    await client.call(client.world.b, "tell", text="before")
    assert await first.until(lambda: _said(first))
    last_id = first.last_id
    await first.close()
    await client.call(client.world.a, "tell", text="between")
    client.arm()
    hears = await client.listen(client.world.b, last_id)
    await client.lift()
    await _hears(client, hears, "between")


async def _hears(client: Client, hears: Call, *texts: str) -> None:
    """These, then what is told now, each once; from where it got to if the stream breaks off."""
    await client.call(client.world.a, "tell", text="now")
    wanted, got = [*texts, "now"], []
    while True:
        whole = await hears.until(lambda: _said(hears)[-1:] == ["now"])  # noqa: B023
        got += _said(hears)
        if whole:
            break
        assert client.case.says_gone, "the stream broke off"
        hears = await client.listen(client.world.a, hears.last_id)
    await hears.close()
    assert got == wanted


@kind
async def a_finished_stream_that_is_resumed(client: Client) -> None:
    await client.open()
    sent = client.start(client.world.a, "POST", call("say", "s"))
    await sent.whole()
    client.arm()
    await _resumed(client, sent.ids[0], sent, 1)


@kind
async def a_running_stream_that_is_resumed(client: Client) -> None:
    await client.open()
    sent = client.start(client.world.a, "POST", call("wait", "w", door=client.key))
    assert await sent.until(lambda: sent.messages)
    client.arm()
    await _resumed(client, sent.last_id, sent, 1)


async def _resumed(client: Client, last_id: str | None, sent: Call, had: int) -> None:
    messages = sent.messages[:had]
    while not any(message.get("id") for message in messages):
        again = await client.listen(client.world.b, last_id)
        client.world.door(client.key).set()
        await again.whole()
        messages += again.messages
        last_id = again.last_id or last_id
    assert _is_told(messages[-1], "said", "waited"), messages
    if "result" in messages[-1] and not client.case.says_gone:
        await sent.whole()
        assert await client.outcome(sent, messages[-1]["id"]) == messages[-1]


@kind
async def delete(client: Client) -> None:
    await client.open()
    client.arm()
    await client.send_delete()
    await client.lift()
    for node in client.nodes:
        gone = client.start(node, "POST", call("echo", "late"))
        await gone.whole()
        if client.case.says_gone and gone.status == 200:
            # It had said so without having done it.
            continue
        assert gone.status == 404
    await client.open()


@kind
async def subscribe(client: Client) -> None:
    await client.open()
    client.arm()
    await _asked(client, "resources/subscribe", uri="x://1")


@kind
async def set_level(client: Client) -> None:
    await client.open()
    client.arm()
    await _asked(client, "logging/setLevel", level="debug")


async def _asked(client: Client, method: str, **params: Any) -> None:
    sent = await client.send(client.world.b, "POST", {"jsonrpc": "2.0", "id": "m", "method": method, "params": params})
    answer = await client.outcome(sent, "m")
    assert answer.get("result") == {} or _is_told(answer), answer


@kind
async def session_state(client: Client) -> None:
    await client.open()
    client.arm()
    answers = [await client.call(node, "count") for node in (*client.nodes, *client.nodes)]
    await client.lift()
    counted = sum("result" in answer and not answer["result"].get("isError") for answer in answers)
    total = int(_text(await client.call(client.world.b, "count")))
    assert counted < total <= len(answers) + 1 + len(client.refusals)


@kind
async def state_of_fastmcp(client: Client) -> None:
    await client.open()
    client.arm()
    await client.call(client.world.b, "keep", session=client.id)
    await client.lift()
    assert _text(await client.call(client.world.a, "keep", session=client.id)) == "{'value': 1}"


# ---- the cases


async def played(world: World, case: Case, play: Kind) -> Client:
    """Plays one case to its end."""
    client = Client(world, case)
    try:
        await play(client)
        await client.lift()
        if client.case.says_gone and world.a.manager.settings.placement == "owner":
            # What a node held is gone with the session that it believes to be.
            await client.send_delete()
            await client.open()
        await client.works()
        await client.leave()
    except BaseException as error:
        error.add_note(f"{case}, fired: {client.fault.fired.is_set()}, refusals: {client.refusals}")
        raise
    return client


async def cases_of(world: World, kinds: dict[str, Kind]) -> list[Case]:
    """Every error at each of the first calls of each method that each kind of request makes."""
    found: list[Case] = []
    for name, play in kinds.items():
        quiet = Case(name, "none", 1, HANG, False)
        client = Client(world, quiet)
        await play(client)
        counted = +world.commands.counted[client.key]
        await client.works()
        await client.leave()
        for method, count in counted.items():
            for nth in range(1, min(count, 4) + 1):
                found += [Case(name, method, nth, error, False) for error in (*ERRORS, HANG)]
                if method in WRITES:
                    found += [Case(name, method, nth, error, True) for error in (*ERRORS, HANG)]
    return found


async def play_all(world: World, cases: list[Case], kinds: dict[str, Kind], at_once: int = 40) -> None:
    failed: list[tuple[Case, BaseException]] = []
    room = asyncio.Semaphore(at_once)
    fired = 0

    async def one(case: Case) -> None:
        nonlocal fired
        async with room:
            try:
                client = await played(world, case, kinds[case.kind])
                fired += client.fault.fired.is_set()
            except Exception as error:
                failed.append((case, error))

    await asyncio.gather(*map(one, cases))
    print(f"{len(cases)} cases, {fired} struck, {len(failed)} failed")
    for case, error in failed[:40]:
        print(case, "->", repr(error)[:600])
    if failed:
        raise failed[0][1]
    assert fired > len(cases) * 0.8


some_or_every = pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every"]
)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience is short, so that hundreds of cases run in seconds."""
    for module, name, seconds in (
        (exchange, "_RETRY_PAUSE", 0.05),
        (stream, "_RETRY_PAUSE", 0.05),
        (sender, "_PATIENCE", 0.3),
        (relay, "_PATIENCE", 0.3),
        (post, "PATIENCE_FOR_WHAT_COMES_ONCE", 0.3),
        (sessions, "PATIENCE_FOR_WHAT_COMES_ONCE", 0.3),
        (reader, "LIVENESS_POLL", 0.1),
        (inbox, "_RETRY_PAUSE", 0.05),
        (placement, "_CERTAIN_AFTER", 0.2),
        (rescue, "_BETWEEN_LOOKS", 0.1),
        (rescue, "_PROBE_AFTER_SECONDS", 0.3),
        (cluster_log, "_PAUSE", 0.05),
    ):
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, seconds)


@asynccontextmanager
async def leaving_nothing(**options: Any) -> AsyncIterator[World]:
    """Two nodes that have nothing left when all is done, and have logged nothing but what the store did wrong."""
    before = asyncio.all_tasks()
    errors = _Errors()
    logging.getLogger("nonstick").addHandler(errors)
    try:
        async with World(**{"max_stall": 1.0, "lease": 1.0, **options}) as world:
            at_rest = {node: len(node.services.tasks._running) for node in map(node_of, (world.a, world.b))}
            yield world
            for node, tasks in at_rest.items():
                await eventually(lambda: not node.sessions)  # noqa: B023
                await eventually(lambda: not (len(node.services.requests) or len(node.listeners)))  # noqa: B023
                await eventually(lambda: len(node.services.tasks._running) <= tasks)  # noqa: B023
                assert not node.services.cluster_log.hearers
    finally:
        logging.getLogger("nonstick").removeHandler(errors)
    await eventually(lambda: asyncio.all_tasks() <= before | {asyncio.current_task()})
    assert not errors.found, errors.found


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "the store has a defect" not in message and "handler for" not in message:
            self.found[f"{record.name}: {message} {record.exc_info and record.exc_info[1]!r}"] += 1


SEED: Final = 20_261
SHARE: Final = 0.05
"""Of all cases, that are played by default; each kind of request meets each error in them."""


def chosen(cases: list[Case], seed: int) -> list[Case]:
    """Some of them: of each kind of request, each error at least once."""
    dice = random.Random(seed)
    shuffled = dice.sample(cases, len(cases))
    firsts = {(case.kind, case.error): case for case in shuffled}
    more = [case for case in shuffled if dice.random() < SHARE]
    return list(dict.fromkeys([*firsts.values(), *more]))


@some_or_every
@unhurried("lease", 1.0, 4.0, 16.0)
async def test_every_store_error_is_answered(every: bool, lease: float) -> None:
    """P9: no 500, nothing hangs, no end is lost, nothing is left behind, and then the session works."""
    async with leaving_nothing(lease=lease) as world:
        cases = await cases_of(world, KINDS)
        print(f"seed {SEED}, of {len(cases)} cases")
        await play_all(world, cases if every else chosen(cases, SEED), KINDS)


@some_or_every
@unhurried("lease", 1.0, 4.0, 16.0)
async def test_store_errors_beside_owner_are_answered(every: bool, lease: float) -> None:
    """P7, P9: the same, with `placement="owner"`, from the other node."""
    async with leaving_nothing(placement="owner", lease=lease) as world:
        cases = await cases_of(world, OWNED)
        print(f"seed {SEED}, of {len(cases)} cases")
        await play_all(world, cases if every else chosen(cases, SEED), OWNED)


# ---- what concerns no session, or all of them: each case on nodes of its own


Play = Callable[[World, Case], Coroutine[Any, Any, None]]


async def play_apart(cases: list[Case], play: Play, at_once: int = 25, **options: Any) -> None:
    room, fired = asyncio.Semaphore(at_once), 0

    async def one(case: Case) -> None:
        nonlocal fired
        async with room:
            try:
                async with asyncio.timeout(DEADLINE), World(max_stall=1.0, lease=1.0, **options) as world:
                    await play(world, case)
                    fault = next(iter(world.commands.faults.values()))
                    fired += fault.fired.is_set()
            except BaseException as error:
                error.add_note(str(case))
                raise

    await asyncio.gather(*map(one, cases))
    print(f"{len(cases)} cases, {fired} struck")
    assert fired > len(cases) / 3


def one_of_each(cases: list[Case]) -> list[Case]:
    """Of each method, each error once."""
    dice = random.Random(SEED)
    return list({(case.method, case.error): case for case in dice.sample(cases, len(cases))}.values())


def cases_for(kind: str, *methods: str, nths: range = range(1, 2)) -> list[Case]:
    names = (*ERRORS, HANG)
    return [
        Case(kind, method, nth, error, after)
        for method in methods
        for nth in nths
        for error in names
        for after in ((False, True) if method in WRITES else (False,))
    ]


@some_or_every
async def test_every_cluster_log_error_is_survived(every: bool) -> None:
    """P9, P11: the call raises `StoreUnavailable` or nothing, and once it was made every client has heard of it."""

    async def play(world: World, case: Case) -> None:
        client = Client(world, case)
        await client.open()
        hears = await client.listen(world.b, None)
        client.key = CLUSTER_KEY
        client.arm()
        # One that starts meanwhile, and joins.
        late = await world.node()
        refused: list[str] = []
        while True:
            try:
                await world.a.cluster.notify_tools_changed()
                break
            except StoreUnavailable as error:
                refused.append(str(error))
                await asyncio.sleep(0.05)
        assert set(refused) <= {STORE_AWAY}
        await client.lift()
        assert await hears.until(lambda: "notifications/tools/list_changed" in _methods(hears))
        await late.cluster.notify_prompts_changed()
        assert await hears.until(lambda: "notifications/prompts/list_changed" in _methods(hears))
        await eventually(lambda: world.got.count("PromptsListChanged") >= 3)
        await hears.close()

    cases = cases_for("notify", "load", "create", "update", "append", "read", "watch", nths=range(1, 3))
    await play_apart(cases if every else one_of_each(cases), play)


@some_or_every
async def test_every_key_change_error_is_survived(every: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """P9: the rotation raises `StoreUnavailable` or nothing, and may be called again."""
    monkeypatch.setattr(cluster, "_SPREAD_SECONDS", 0.1)

    async def play(world: World, case: Case) -> None:
        client = Client(world, case)
        client.key = CLUSTER_KEY
        client.arm()
        while True:
            try:
                await world.a.cluster.rotate_request_state_key()
                break
            except StoreUnavailable:
                await asyncio.sleep(0.05)
        await client.lift()
        codecs = [node.cluster._codec for node in client.nodes]

        async def shared() -> bool:
            return codecs[1]._keyed is not None and unseals(codecs[1], codecs[0].seal(b"state"))

        await eventually(shared)

    cases = cases_for("rotate", "load", "update", "append", nths=range(1, 4))
    await play_apart(cases if every else one_of_each(cases), play)


def _methods(hears: Call) -> list[str]:
    return [message["method"] for message in hears.messages]


def unseals(codec: Any, sealed: str) -> bool:
    try:
        return bool(codec.unseal(sealed) == b"state")
    except InvalidRequestState:
        return False


@some_or_every
async def test_every_rescue_error_ends_request_once(every: bool) -> None:
    """P7, P9: of all that the client's connection asks the store."""

    async def play(world: World, case: Case) -> None:
        client = Client(world, case)
        await client.open()
        request = {"jsonrpc": "2.0", "id": "lost", "method": "tools/call", "params": {"name": "echo"}}
        body = {"node": "nobody-1", "attempt": 1, "request": request}
        opened = draft(Kinds.OPENED, pydantic_core.to_json(body))
        stream = (await world.memory.append(client.key, Batch([opened], stream=NEW_STREAM))).first
        if case.method == "lapsed":
            client.key = EVERYWHERE
        client.arm()
        last_id = EventId(stream, Cursor(stream, opened.tag), "lost").seal(client.id)
        ends: list[Message] = []
        while not ends:
            hears = await client.listen(world.b, last_id)
            await hears.whole()
            ends = hears.messages
        (end,) = ends
        assert end["id"] == "lost"
        assert end["error"]["data"]["reason"] in ("node_lost", "stream_lost")
        assert end["error"]["data"]["reason"] == "node_lost" or case.error == "Diverged"

    # Each waits for its node to be seen dead twice.
    cases = cases_for("rescue", "lapsed", "read", "append", "watch", nths=range(1, 3))
    await play_apart(cases if every else one_of_each(cases), play, at_once=len(cases))


@some_or_every
async def test_every_drain_error_leaves_one_end(every: bool) -> None:
    """P8, P9: what the store did not take of the end, another node says."""

    async def play(world: World, case: Case) -> None:
        client = Client(world, case)
        await client.open()
        sent = client.start(world.a, "POST", call("wait", "w", door="never"))
        hears = await client.listen(world.a, None)
        assert await sent.until(lambda: sent.messages)
        client.arm()
        began = asyncio.get_running_loop().time()
        await world.a.manager.drain()
        assert asyncio.get_running_loop().time() - began < world.a.manager.settings.grace + 2
        await hears.whole()
        await sent.whole()
        await client.lift()
        await world.stop(world.a)
        world.a = world.b
        client.is_told(await client.outcome(sent, "w"))

    cases = cases_for("drain", "append", "update", "read", "load", nths=range(1, 3))
    await play_apart(cases if every else one_of_each(cases), play)


@some_or_every
@unhurried("idle", 3.0, 12.0, 48.0)
async def test_every_node_error_is_an_outage(every: bool, idle: float) -> None:
    """P9: readiness says so; what is renewed is renewed the next time."""

    async def play(world: World, case: Case) -> None:
        client = Client(world, case)
        await client.open()
        hears = await client.listen(world.a, None)
        client.key = EVERYWHERE
        client.arm()
        if case.method == "ping":
            with pytest.raises(StoreUnavailable):
                while True:
                    await world.a.manager.check_ready()
                    assert not client.fault.fired.is_set() or client.fault.seconds
                    await asyncio.sleep(0.01)
        else:
            async with asyncio.timeout(DEADLINE):
                await client.fault.fired.wait()
        await client.lift()
        await world.a.manager.check_ready()
        await client.works_at(world.b)
        await hears.close()

    cases = cases_for("none", "ping", "touch")
    await play_apart(cases if every else one_of_each(cases), play, session_idle_timeout=idle)
