"""Ending, or running again, a request whose node was lost (P7).

Leases give liveness only. What makes it safe is the store's compare-and-set: of all who try, and of the lost node
itself should it wake up, one writes the terminal event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from mcp.server.runner import ServerRunner
from mcp.server.streamable_http import REQUEST_CANCELLED
from mcp.shared.dispatcher import CallOptions
from mcp.shared.exceptions import NoBackChannelError
from mcp.shared.transport_context import TransportContext
from mcp_types import ErrorData, JSONRPCRequest
from starlette.requests import Request

from nonstick.core.events import Kind, decode, draft, glimpse, kind_of
from nonstick.core.jsonrpc import error_body, request_key
from nonstick.core.names import new_name
from nonstick.core.refusals import NODE_LOST
from nonstick.errors import Diverged, Fenced, NotPending, StreamClosed
from nonstick.log.follow import Slice, whole
from nonstick.session.live import Session
from nonstick.session.portable import context_of
from nonstick.store import MAX_CLIP, MAX_READ, Batch, Cursor, Event

__all__ = ["Rescue"]

logger = logging.getLogger(__name__)

_BETWEEN_LOOKS = 1.0
"""Seconds, at least, between two looks whether the node that should write still lives."""

_MOVED = 5.0
"""Seconds without a look after which the stream must have moved meanwhile."""

_PROBE_AFTER = 30.0
"""Seconds of silence after which the request is asked whether it still runs."""

_LIST_PAGES = 100
_LIST_SECONDS = 10.0
"""For the list of tools; a server that takes longer does not say of its tools that they may be called again."""

_METHOD = b'"method"'


class Rescue:
    """Watches over one unfinished stream on behalf of a client that reads it.

    Args:
        opened: The stream's first event.
    """

    def __init__(self, session: Session, opened: Event) -> None:
        self._session = session
        self._opened = opened
        self._stream = opened.position
        body = decode(opened.data)
        self._node: str = body["node"]
        self._attempt: int = body["attempt"]
        self._first_attempt = self._attempt
        self._request = JSONRPCRequest.model_validate(body["request"], by_name=False)
        self._relayed = "relay" in body
        """The session's owner is to run it, and was not seen to do so yet."""
        self._is_whole = not body.get("partial")
        self._trace: dict[str, str] = body.get("trace", {})
        self._suspected = False
        self._cancelled = False
        self._asked: set[str] = set()
        """Keys of server requests of the lost node that nobody answered."""
        self._loop = asyncio.get_running_loop()
        self._looked_at = self._loop.time()
        self._quiet_since = self._looked_at
        self._probe: int | None = None

    def taken(self, event: Event) -> None:
        """Another node runs the request now."""
        body = decode(event.data)
        self._node, self._attempt, self._suspected = body["node"], body["attempt"], False
        self._relayed = False

    async def look(self) -> None:
        """Looks whether the node that runs the request lives; acts when it is seen dead twice.

        Twice, because after an outage of the store every lease has lapsed, and the living need a moment to renew. May
        be called as often as one likes: there are some seconds between two looks.

        Raises:
            SessionNotFound, StoreUnavailable: As the store's methods.
        """
        session, now = self._session, self._loop.time()
        if now - self._looked_at < _BETWEEN_LOOKS:
            return
        if now - self._looked_at > _MOVED:
            # Nobody looks beside a stream that moves.
            self._quiet_since, self._probe = now, None
        self._looked_at = now
        dead = False
        if self._relayed:
            lost = False
            await session.node.placement.settle(session)
        elif self._node == session.node.id:
            running = any(exchange.stream == self._stream for exchange in session.exchanges.values())
            lost = not running
        else:
            lost = dead = bool(await session.node.store.lapsed([self._node]))
        suspected, self._suspected = self._suspected, lost
        if (lost and suspected) or (not lost and await self._is_mute(now)):
            await self._act(dead=dead)

    async def _is_mute(self, now: float) -> bool:
        """Whether the node lives and yet nobody there works for the stream: a failover may have lost its end (P9)."""
        settings = self._session.node.settings
        if self._probe is None:
            if now - self._quiet_since < _PROBE_AFTER:
                return False
            batch = Batch([draft(Kind.PROBE)], stream=self._stream, attempt=self._attempt)
            try:
                self._probe = (await self._session.node.store.append(self._session.key, batch)).first
            except (StreamClosed, Fenced):
                # It has ended, or moved: the log will bring it.
                self._quiet_since = now
            return False
        try:
            entries = await self._session.node.store.skim(
                self._session.key, Cursor(self._probe), limit=MAX_READ, clip=2
            )
        except Diverged:
            # The store lost the question. Whoever follows the stream finds out whether it lost of that too.
            self._quiet_since, self._probe = now, None
            return False
        if any(event.stream == self._stream and kind_of(event.data) is not Kind.PROBE for event, _ in entries):
            self._quiet_since, self._probe = now, None
            return False
        # A node whose loop hangs answers late; one that hung for longer has lost its lease.
        return now - self._quiet_since > _PROBE_AFTER + settings.max_stall + settings.lease

    async def _act(self, *, dead: bool) -> None:
        """Ends the request, or runs it again. `dead`: its node is, too, and not only the request."""
        node = self._node
        await self._catch_up()
        if self._node != node:
            return
        if self._cancelled:
            await self._end(ErrorData(code=REQUEST_CANCELLED, message="Request cancelled"))
            return
        owned = await self._session.node.placement.is_owned(self._session)
        if owned:
            await self._session.node.placement.settle(self._session, gone=node if dead else "")
        safe = not owned and await self._may_repeat()
        again = safe and self._is_whole and self._session.node.settings.reexecute == "idempotent"
        if again and await self._run_again():
            return
        await self._end(NODE_LOST.error(retry_safe=safe))

    async def _end(self, error: ErrorData) -> None:
        """Writes the end of the stream, unless somebody else has, or has taken it over."""
        terminal = draft(Kind.TERMINAL, error_body(self._request.id, error))
        batch = Batch(
            [terminal],
            writer=new_name(),
            sequence=1,
            stream=self._stream,
            attempt=self._attempt,
            terminal=True,
        )
        try:
            await self._session.node.store.append(self._session.key, batch)
        except (StreamClosed, Fenced):
            return
        self._session.node.counters.rescued += 1
        logger.warning("session %s: ended a request whose node was lost", self._session.key[:12])
        await self._withdraw()

    async def _catch_up(self) -> None:
        """Finds out what came before the place where this client began to read: who took over, and cancels (P5)."""
        store, log, after, part = self._session.node.store, self._session.key, Cursor(self._stream), Slice(MAX_READ)
        while entries := await part.skim(store, log, after):
            for entry in entries:
                if kind_of(entry.event.data) in (Kind.TAKEN, Kind.CANCEL) and (event := await whole(store, log, entry)):
                    self._note(event)
                self._note_question(entry.event)
            after = Cursor(entries[-1].event.position)

    def _note(self, event: Event) -> None:
        if kind_of(event.data) is Kind.CANCEL:
            self._cancelled |= request_key(decode(event.data)["requestId"]) == request_key(self._request.id)
        elif event.stream == self._stream:
            self.taken(event)

    def _note_question(self, event: Event) -> None:
        """Keeps account of the server requests that the lost node waits for. Large events may be cut off."""
        kind = kind_of(event.data)
        if kind is Kind.MESSAGE and event.stream == self._stream and _METHOD in event.data[:MAX_CLIP]:
            body = glimpse(event.data)
            if "method" in body and "id" in body:
                self._asked.add(request_key(body["id"]))
        elif kind is Kind.REPLY and self._asked:
            self._asked.discard(request_key(glimpse(event.data).get("id", "")))

    async def _withdraw(self) -> None:
        """Nobody waits any more for what the lost node asked: the pending set is not to grow with each that is lost."""
        while self._asked:
            with contextlib.suppress(NotPending):
                await self._session.append(Batch([], settle=self._asked.pop()))

    async def _run_again(self) -> bool:
        # Imported here: an exchange knows its session, and a session's streams are rescued from its readers.
        from nonstick.session.exchange import Exchange

        session = self._session
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
        request = Request(scope)
        exchange = Exchange(
            session,
            self._request,
            request,
            # A cancel may come until it is registered here (P5).
            head=self._opened.cursor,
            protocol_version=session.protocol_version,
        )
        taken = await exchange.take_over(self._stream, self._attempt, first=self._first_attempt)
        if taken:
            exchange.start(context_of(request, self._trace))
            session.node.counters.reexecuted += 1
            await self._withdraw()
        return taken

    async def _may_repeat(self) -> bool:
        """Whether the request may safely be made again: it calls a tool that says so of itself, or only reads."""
        params = self._request.params or {}
        if self._request.method != "tools/call":
            return (
                self._request.method.endswith(("/list", "/read", "/get", "/complete")) or self._request.method == "ping"
            )
        tool = await self._look_up(str(params.get("name")))
        annotations = (tool or {}).get("annotations") or {}
        return bool(annotations.get("readOnlyHint") or annotations.get("idempotentHint"))

    async def _look_up(self, name: str) -> dict[str, Any] | None:
        """The tool, if the server lists it in time: in a task of its own, for its handler may end in any way (P16)."""
        node = self._session.node
        task = node.spawn(node.contained(self._find_tool(name), "handler for 'tools/list'"))
        try:
            await asyncio.wait([task], timeout=_LIST_SECONDS)
        finally:
            task.cancel()
        return task.result() if task.done() and not task.cancelled() else None

    async def _find_tool(self, name: str) -> dict[str, Any] | None:
        self._session.make_current()
        node, connection = self._session.node, self._session.connection
        runner: ServerRunner[Any] = ServerRunner(node.server, connection, node.lifespan_state)
        cursor: str | None = None
        for _ in range(_LIST_PAGES):
            page = await runner.on_request(_Silent(), "tools/list", None if cursor is None else {"cursor": cursor})
            for tool in page.get("tools", []):
                if tool.get("name") == name:
                    found: dict[str, Any] = tool
                    return found
            cursor = page.get("nextCursor")
            if not isinstance(cursor, str):
                break
        return None


class _Silent:
    """The `DispatchContext` of a request that no client made: nothing can be sent."""

    def __init__(self) -> None:
        import anyio

        self.transport = TransportContext(kind="streamable-http", can_send_request=False)
        self.can_send_request = False
        self.request_id = "nonstick-lookup"
        self.message_metadata = None
        self.cancel_requested = anyio.Event()

    async def send_raw_request(self, method: str, params: Any, opts: CallOptions | None = None) -> dict[str, Any]:
        raise NoBackChannelError(method)

    async def notify(self, method: str, params: Any, opts: CallOptions | None = None) -> None:
        return None

    async def progress(self, progress: float, total: float | None = None, message: str | None = None) -> None:
        return None
