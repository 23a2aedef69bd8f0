"""Ending, or running again, a request whose node was lost (P7).

Leases give liveness only. Safety comes from the store's compare-and-set: of all nodes that try, and of the lost node
itself should it wake up, one writes the terminal event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import anyio
import pydantic_core
from mcp.shared.dispatcher import CallOptions
from mcp.shared.exceptions import NoBackChannelError
from mcp_types import ErrorData, JSONRPCRequest
from starlette.requests import Request

from nonstick.core.events import Kind, draft, kind_of
from nonstick.core.jsonrpc import error_body
from nonstick.core.refusals import CANCELLED_BY_CLIENT, NODE_LOST
from nonstick.core.streams import History
from nonstick.errors import Diverged, Fenced, NotPending, StreamClosed
from nonstick.log.follow import Slice, whole
from nonstick.log.writer import once
from nonstick.session.exchange import Exchange
from nonstick.session.live import LiveSession
from nonstick.session.portable import context_of
from nonstick.store import MAX_READ, Batch, Cursor, Event

__all__ = ["Rescue"]

logger = logging.getLogger(__name__)

_BETWEEN_LOOKS = 1.0
"""Seconds, at least, between two looks whether the node that should write still lives."""

_MOVED_SECONDS = 5.0
"""Seconds without a look after which the stream must have moved: nobody looks while it does."""

_PROBE_AFTER_SECONDS = 30.0
"""Seconds of silence after which the request is asked whether it still runs."""

_LIST_PAGES = 100
_LIST_SECONDS = 10.0
"""For the list of tools; a server that takes longer does not say of its tools that they may be called again."""


class Rescue:
    """Watches over one unfinished stream on behalf of a client that reads it.

    Args:
        opened: The stream's first event.
    """

    def __init__(self, session: LiveSession, opened: Event) -> None:
        self._session = session
        self._opened = opened
        self._history = History(opened)
        self._suspected = False
        """The node was seen dead once."""
        self._loop = asyncio.get_running_loop()
        self._looked_at = self._loop.time()
        self._quiet_since = self._looked_at
        self._probe: int | None = None
        """Position of the question whether the request still runs."""

    def taken(self, event: Event) -> None:
        """Another node runs the request now."""
        self._history.life.note(event)
        self._suspected = False

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
        if now - self._looked_at > _MOVED_SECONDS:
            # Nobody looks beside a stream that moves.
            self._quiet_since, self._probe = now, None
        self._looked_at = now
        life, dead = self._history.life, False
        if life.is_relayed:
            lost = False
            await session.services.owners.settle(session.key)
        elif life.node == session.services.node_id:
            running = any(exchange.stream == self._opened.position for exchange in session.exchanges.values())
            lost = not running
        else:
            lost = dead = bool(await session.services.store.lapsed([life.node]))
        suspected, self._suspected = self._suspected, lost
        if (lost and suspected) or (not lost and await self._is_mute(now)):
            await self._act(dead=dead)

    async def _is_mute(self, now: float) -> bool:
        """Whether the node lives and yet nobody there works for the stream: a failover may have lost its end (P9)."""
        settings = self._session.services.settings
        if self._probe is None:
            if now - self._quiet_since < _PROBE_AFTER_SECONDS:
                return False
            batch = Batch([draft(Kind.PROBE)], stream=self._opened.position, attempt=self._history.life.attempt)
            try:
                self._probe = (await self._session.services.store.append(self._session.key, batch)).first
            except (StreamClosed, Fenced):
                # It has ended, or moved: the log will bring it.
                self._quiet_since = now
            return False
        try:
            entries = await self._session.services.store.skim(
                self._session.key, Cursor(self._probe), limit=MAX_READ, clip=2
            )
        except Diverged:
            # The store lost the question. The stream's own reader finds out whether parts of the stream are lost too.
            self._quiet_since, self._probe = now, None
            return False
        if any(event.stream == self._opened.position and kind_of(event.data) is not Kind.PROBE for event, _ in entries):
            self._quiet_since, self._probe = now, None
            return False
        # A node whose loop hangs answers late; one that hung for longer has lost its lease.
        return now - self._quiet_since > _PROBE_AFTER_SECONDS + settings.max_stall + settings.lease

    async def _act(self, *, dead: bool) -> None:
        """Ends the request, or runs it again. `dead`: its node is, too, and not only the request."""
        node = self._history.life.node
        await self._catch_up()
        if self._history.life.node != node:
            self._suspected = False
            return
        if self._history.is_cancelled:
            await self._end(CANCELLED_BY_CLIENT)
            return
        owned = await self._session.services.owners.is_owned(self._session.key)
        if owned:
            await self._session.services.owners.settle(self._session.key, gone=node if dead else "")
        safe = not owned and await self._may_repeat()
        again = safe and not self._history.is_partial and self._session.services.settings.reexecute == "idempotent"
        if again and await self._run_again():
            return
        await self._end(NODE_LOST.error(retry_safe=safe))

    async def _end(self, error: ErrorData) -> None:
        """Writes the end of the stream, unless somebody else has, or has taken it over."""
        life = self._history.life
        terminal = draft(Kind.TERMINAL, error_body(life.request_id, error))
        batch = once(terminal, stream=self._opened.position, attempt=life.attempt, terminal=True)
        try:
            await self._session.services.store.append(self._session.key, batch)
        except (StreamClosed, Fenced):
            return
        logger.warning("session %s: ended a request whose node was lost", self._session.key[:12])
        await self._withdraw()

    async def _catch_up(self) -> None:
        """Finds out what came before the place where this client began to read: takeovers, and cancels (P5)."""
        store, log, after, part = self._session.services.store, self._session.key, self._opened.cursor, Slice(MAX_READ)
        history = History(self._opened)
        while entries := await part.skim(store, log, Cursor(after.position)):
            for entry in entries:
                event = await whole(store, log, entry) if history.wants_whole(entry.event) else entry.event
                if event is not None:
                    history.note(event)
            after = entries[-1].event.cursor
        self._history = history

    async def _withdraw(self) -> None:
        """Nobody waits any more for what the lost node asked: the pending set is not to grow with each that is lost."""
        while self._history.unanswered:
            with contextlib.suppress(NotPending):
                await self._session.log.append(Batch([], settle=self._history.unanswered.pop()))

    @property
    def _message(self) -> JSONRPCRequest:
        return JSONRPCRequest.model_validate(self._history.life.request, by_name=False)

    async def _run_again(self) -> bool:
        session = self._session
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
        request = Request(scope)
        exchange = Exchange(
            session,
            self._message,
            request,
            # A cancel may come until it is registered here (P5).
            head=self._opened.cursor,
            protocol_version=session.record.protocol_version,
        )
        taken = await exchange.take_over(
            self._opened.position, self._history.life.attempt, first=self._history.first_attempt
        )
        if taken:
            exchange.start(context_of(request, self._history.trace))
            await self._withdraw()
        return taken

    async def _may_repeat(self) -> bool:
        """Whether the request may safely be made again: it calls a tool that says so of itself, or only reads."""
        message = self._message
        if message.method != "tools/call":
            return message.method.endswith(("/list", "/read", "/get", "/complete")) or message.method == "ping"
        tool = await self._look_up(str((message.params or {}).get("name")))
        annotations = (tool or {}).get("annotations") or {}
        return bool(annotations.get("readOnlyHint") or annotations.get("idempotentHint"))

    async def _look_up(self, name: str) -> dict[str, Any] | None:
        """The tool, if the server lists it in time: in a task of its own, for its handler may end in any way (P16)."""
        tasks = self._session.services.tasks
        task = tasks.spawn(tasks.contained(self._find_tool(name), "handler for 'tools/list'"))
        try:
            await asyncio.wait([task], timeout=_LIST_SECONDS)
        finally:
            task.cancel()
        return task.result() if task.done() and not task.cancelled() else None

    async def _find_tool(self, name: str) -> dict[str, Any] | None:
        self._session.make_current()
        cursor: str | None = None
        for _ in range(_LIST_PAGES):
            page = await self._list_tools(cursor)
            for tool in page.get("tools", []):
                if tool.get("name") == name:
                    found: dict[str, Any] = tool
                    return found
            cursor = page.get("nextCursor")
            if not isinstance(cursor, str):
                break
        return None

    async def _list_tools(self, cursor: str | None) -> Mapping[str, Any]:
        params = None if cursor is None else {"cursor": cursor}
        message = JSONRPCRequest(jsonrpc="2.0", id="nonstick-lookup", method="tools/list", params=params)
        answer = await self._session.runner.on_request(_Lookup(message))
        if isinstance(answer, bytes):
            answer = pydantic_core.from_json(answer).get("result")
        return answer if isinstance(answer, dict) else {}


class _Lookup:
    """A request that no client made, as the session's runner sees it: nothing can be sent."""

    request = None
    streams = False
    can_send_request = False
    can_close_stream = False

    def __init__(self, message: JSONRPCRequest) -> None:
        self.message = message
        self.cancel_requested = anyio.Event()

    async def ask(self, method: str, params: Any, opts: CallOptions | None = None) -> dict[str, Any]:
        raise NoBackChannelError(method)

    async def notify(self, method: str, params: Any) -> None:
        return None

    async def close_stream(self) -> None:
        return None

    async def close_standalone_stream(self) -> None:
        return None
