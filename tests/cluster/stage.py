"""A server whose tools are the test's own functions, on several nodes in the test's process."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import mcp_types as types
import pytest
from mcp.server import Server, ServerRequestContext
from mcp.shared.dispatcher import CallOptions
from mcp.shared.message import ServerMessageMetadata

from nonstick import current_connection
from nonstick.core.events import Kind, kind_of
from nonstick.core.names import session_key
from nonstick.errors import NotPending, StoreUnavailable
from nonstick.node.node import Node
from nonstick.store import MAX_READ, Batch, Cursor, Event, Store
from nonstick.testing.cluster import Cluster, Member, Session
from tests.cluster.conftest import MakeStore
from tests.cluster.sse import DEADLINE

Context = ServerRequestContext[Any, Any]
Tool = Callable[[Context, dict[str, Any]], Awaitable[Any]]

FORM = types.ElicitRequestFormParams(
    message="name?", requested_schema={"type": "object", "properties": {"name": {"type": "string"}}}
)


class Stage:
    """The nodes, their store as one more instance, and the tools that run on them.

    A tool that waits for `stage.door("x")` waits until the test opens it; `await stage.reached("x")` returns once a
    tool has come to `stage.pass_by("x")`.
    """

    def __init__(self, make_store: MakeStore, **options: Any) -> None:
        self.tools: dict[str, Tool] = {}
        self.marks: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.store = make_store()
        self.cluster = Cluster(self.server, make_store, **options)

    def server(self) -> Server[Any]:
        return Server("stage", version="1", on_list_tools=_no_tools, on_call_tool=self._call)

    async def _call(self, ctx: Context, params: types.CallToolRequestParams) -> types.CallToolResult:
        text = await self.tools[params.name](ctx, params.arguments or {})
        return types.CallToolResult(content=[types.TextContent(text=str(text))])

    def tool(self, function: Tool) -> Tool:
        """Makes this function a tool, under its own name, on every node."""
        self.tools[getattr(function, "__name__")] = function  # noqa: B009
        return function

    def open(self, name: str) -> None:
        """Something happened, or may happen."""
        self.marks[name].set()

    async def door(self, name: str) -> None:
        """Returns once it is open."""
        await self.marks[name].wait()

    async def reached(self, name: str) -> None:
        """As `door`, under a deadline: for the test itself."""
        async with asyncio.timeout(DEADLINE):
            await self.marks[name].wait()

    async def log(self, session: Session) -> list[Event]:
        """The session's whole log."""
        events: list[Event] = []
        after = Cursor(0)
        while batch := await self.store.read(session_key(session.id), after, limit=MAX_READ):
            events += batch
            after = Cursor(batch[-1].position)
        return events

    async def kinds(self, session: Session) -> list[Kind | None]:
        """The kinds of the events in the session's log."""
        return [kind_of(event.data) for event in await self.log(session)]

    async def is_pending(self, session: Session, request_id: str) -> bool:
        """Whether the store waits for the reply to this server request. Settles it, if so."""
        try:
            await self.store.append(session_key(session.id), Batch([], settle=request_id))
        except NotPending:
            return False
        return True

    async def __aenter__(self) -> Self:
        await self.store.__aenter__()
        await self.cluster.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mark in self.marks.values():
            mark.set()
        await self.cluster.__aexit__(kind, error, trace)
        await self.store.__aexit__(None, None, None)


@asynccontextmanager
async def staged(make_store: MakeStore, **options: Any) -> AsyncIterator[tuple[Stage, Member, Member, Member]]:
    """A stage with three nodes, and the nodes."""
    async with Stage(make_store, **options) as stage:
        a, b, c = stage.cluster
        yield stage, a, b, c


def node_of(member: Member) -> Node:
    """The node itself, to look into it."""
    node = member.app.manager._node
    assert node is not None
    return node


async def _no_tools(ctx: Context, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
    return types.ListToolsResult(tools=[])


# ---- what tools do


async def say(ctx: Context, text: str) -> None:
    """Sends a log message on the request's stream."""
    await ctx.session.send_notification(_log(text), related_request_id=ctx.request_id)


async def announce(ctx: Context, text: str) -> None:
    """Sends a log message on the session's standalone stream."""
    await ctx.session.send_notification(_log(text))


def _log(text: str) -> types.LoggingMessageNotification:
    return types.LoggingMessageNotification(params=types.LoggingMessageNotificationParams(level="info", data=text))


async def ask(ctx: Context, **opts: Any) -> dict[str, Any]:
    """Asks the client, on the request's stream, with these `CallOptions`."""
    session: Any = ctx.session
    progress = opts.pop("on_progress", None)
    result = await session.send_request(
        types.ElicitRequest(params=FORM),
        types.ElicitResult,
        request_read_timeout_seconds=opts.pop("timeout", None),
        metadata=_related(ctx),
        progress_callback=progress,
    )
    assert not opts
    found: dict[str, Any] = result.model_dump(exclude_none=True)
    return found


async def ask_standalone(method: str, params: dict[str, Any] | None = None, **opts: Any) -> dict[str, Any]:
    """Asks the client on the session's standalone stream."""
    options: CallOptions = opts  # type: ignore[assignment]
    return await current_connection().send_raw_request(method, params, options)


def _related(ctx: Context) -> Any:
    return ServerMessageMetadata(related_request_id=ctx.request_id)


# ---- what a client sends and gets


def call(tool: str, id: Any = 1, meta: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:  # noqa: A002
    """A call of a tool."""
    params = {"name": tool, "arguments": arguments} | ({} if meta is None else {"_meta": meta})
    return {"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params}


def notification(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, "params": params}


def cancel(request_id: Any) -> dict[str, Any]:
    return notification("notifications/cancelled", requestId=request_id)


def accept(request: dict[str, Any], name: str = "Ada") -> dict[str, Any]:
    """The reply to an elicitation."""
    return {"jsonrpc": "2.0", "id": request["id"], "result": {"action": "accept", "content": {"name": name}}}


def text_of(message: dict[str, Any]) -> Any:
    """What a log message says, or a tool answered; what an error says."""
    if "error" in message:
        return message["error"]["message"]
    if "result" in message:
        return message["result"]["content"][0]["text"]
    return message["params"]["data"]


def texts_of(messages: Sequence[dict[str, Any]]) -> list[Any]:
    return [text_of(message) for message in messages]


async def eventually(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Returns once this holds: for what nothing announces. Fails after the deadline."""
    async with asyncio.timeout(DEADLINE):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0.01)


quiet = pytest.mark.filterwarnings("ignore::mcp.shared.exceptions.MCPDeprecationWarning")


# ---- a store that can be held up


class HeldStore:
    """A node's store whose calls of one method wait, before or after they took effect, while the test holds them.

    With `after`, the store has written, and its acknowledgement is held.
    """

    def __init__(self, store: Store, method: str, *, after: bool, when: Callable[..., bool] = lambda *_: True) -> None:
        self._store = store
        self._method = method
        self._after = after
        self._when = when
        self.holding = False
        self.held = asyncio.Event()
        self.count = 0
        """Calls that were held up, or that could not be reached."""
        self.released = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._store, name)
        return self._hold(attribute) if name == self._method else attribute

    def _hold(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def held(*args: Any, **options: Any) -> Any:
            if not self.holding or not self._when(*args):
                return await method(*args, **options)
            if not self._after:
                self.held.set()
                await self.released.wait()
                return await method(*args, **options)
            result = await method(*args, **options)
            self.held.set()
            await self.released.wait()
            return result

        return held

    @property
    def url(self) -> str:
        return self._store.url

    async def __aenter__(self) -> Self:
        await self._store.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._store.__aexit__(*error)


class DownStore(HeldStore):
    """A node's store one of whose methods cannot be reached while the test says so; `after`: it can, but not back."""

    def _hold(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def down(*args: Any, **options: Any) -> Any:
            if not self.holding or not self._when(*args):
                return await method(*args, **options)
            if self._after:
                await method(*args, **options)
            self.count += 1
            self.held.set()
            raise StoreUnavailable("cut off by the test")

        return down
