"""A client that expects the worst: raw HTTP, its own SSE reader, every request to another node.

It keeps to the protocol: it resumes with the last event id that it received in full, repeats a request only when it
was certainly not taken, and writes all it sees into a history for the oracle.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx2

from nonstick.core.event_ids import parse_event_id
from nonstick.testing.oracle import (
    Answered,
    Called,
    Caught,
    Ending,
    GaveUp,
    Got,
    Lost,
    Opened,
    Place,
    Record,
    Replayed,
    Replied,
    Restarted,
    Vanished,
    token_of,
)

__all__ = ["Call", "History", "Patience", "Session", "Target", "error_of"]

HEADERS = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
VERSION = "2025-11-25"
PAUSE = 0.05
REPLAYS = 5
REPLAY_SECONDS = 8.0
"""Without an end, after which a replay of a finished stream has none."""
LOST_REPLAY_SECONDS = 60.0
"""The same where the store may have lost the end: a silent stream is asked whether its request runs after 30 s, and is
ended once nobody has answered for as long as a node may hang."""
FENCE_SECONDS = 5.0


class Target(Protocol):
    """A node, as far as a client is concerned."""

    @property
    def name(self) -> str: ...

    @property
    def url(self) -> str: ...


@dataclass(slots=True)
class History:
    """What was recorded so far, and a counter that makes labels unique.

    Attributes:
        requests: HTTP requests of sessions that were answered.
    """

    records: list[Record] = field(default_factory=list)
    labels: itertools.count[int] = field(default_factory=itertools.count)
    requests: int = 0
    _losses: list[Lost] = field(default_factory=list)

    def add(self, record: Record) -> None:
        self.records.append(record)
        if isinstance(record, Lost):
            self._losses.append(record)
        elif isinstance(record, Answered):
            self.requests += 1

    def lost_since(self, at: float) -> bool:
        """Whether the store may have lost something that was written after this."""
        return any(one.until >= at for one in self._losses)


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. `idle`: without a byte, after which a connection counts as dead; more than the server's ping interval.
    `call`: until a call must have ended."""

    idle: float = 3.0
    call: float = 60.0


@dataclass(slots=True)
class Call:
    """A request as it goes on: `terminal` is None until it ended, and stays so if the client gave up."""

    label: str
    request_id: int
    messages: list[dict[str, Any]] = field(default_factory=list)
    terminal: dict[str, Any] | None = None
    last: str | None = None
    ids: list[str] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[dict[str, Any] | None] | None = None
    begun: float = field(default_factory=time.monotonic)

    async def end(self) -> dict[str, Any] | None:
        assert self.task is not None
        return await self.task


class _Cut(Exception):
    """This side closes the connection here."""


class Session:
    """One client's session, on whichever of the targets each request picks.

    Args:
        cuts: Share of the connections that the client cuts at a random byte.
        retry_unsent: Told a label whose connection broke before any byte of an answer; says whether it is certain
            that it was not taken, so that it is sent again.
        lure: Names the target of every request, while it names one.
    """

    def __init__(
        self,
        http: httpx2.AsyncClient,
        targets: Sequence[Target],
        history: History,
        rng: random.Random,
        *,
        name: str,
        patience: Patience | None = None,
        cuts: float = 0.0,
        retry_unsent: Callable[[str], bool] = lambda _: False,
        lure: Callable[[], Target | None] = lambda: None,
    ) -> None:
        self.name = name
        self.id = ""
        self.ended = False
        self.gone = False
        """It was answered with 404."""
        self.deaf = False
        """It replies to no server request."""
        self.retry: list[str] = []
        self.history = history
        self.targets = targets
        self._http = http
        self._rng = rng
        self._patience = patience or Patience()
        self._cuts = cuts
        self._retry_unsent = retry_unsent
        self._lure = lure
        self._ids = itertools.count(1)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._standalone = Call("", 0)
        self._listening: asyncio.Task[None] | None = None
        self._connection: asyncio.Task[int] | None = None
        """The one that reads the standalone stream now."""
        self._seen = asyncio.Condition()
        self._restarts = 0

    # ---- requests

    async def open(self, on: Target | None = None) -> None:
        """`initialize`, again until it succeeds: a session that nobody heard of harms nobody."""
        params = {
            "protocolVersion": VERSION,
            "capabilities": {"elicitation": {}},
            "clientInfo": {"name": self.name, "version": "1"},
        }
        message = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}
        async with asyncio.timeout(self._patience.call):
            while True:
                sent = time.monotonic()
                try:
                    answer = await self._post(message, on)
                except (httpx2.TransportError, TimeoutError):
                    await asyncio.sleep(PAUSE)
                    continue
                if answer.status_code == 200:
                    break
                assert answer.status_code == 503, answer.text
        self.id = answer.headers["mcp-session-id"]
        self.history.add(Opened(time.monotonic(), sent, self.name))
        await self.notify("notifications/initialized")

    def call(
        self,
        tool: str,
        *,
        on: Target | None = None,
        steps: int = 0,
        standalone: bool = False,
        repeatable: bool = False,
        **arguments: Any,
    ) -> Call:
        """Calls a tool; everything about it is read in the background, over as many connections as it takes."""
        label = f"{self.name}-{next(self.history.labels)}-{tool}"
        arguments["label"] = label
        if tool in ("count", "recount", "announce"):
            arguments["steps"] = steps
        elif tool == "ask":
            arguments["rounds"] = steps
        call = Call(label, next(self._ids))
        self.history.add(Called(time.monotonic(), self.name, label, call.request_id, steps, standalone, repeatable))
        params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": label}}
        message = {"jsonrpc": "2.0", "id": call.request_id, "method": "tools/call", "params": params}
        call.task = self._spawn(self._see_through(call, message, on))
        return call

    async def notify(self, method: str, params: dict[str, Any] | None = None, on: Target | None = None) -> int | None:
        """Sends a notification until it is accepted. Its status; None if the session or the time is over."""
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method}
        return await self._insist(message if params is None else message | {"params": params}, on)

    async def cancel(self, call: Call, on: Target | None = None) -> int | None:
        return await self.notify("notifications/cancelled", {"requestId": call.request_id}, on)

    async def delete(self, on: Target | None = None) -> int:
        """DELETE, again until it is answered. Its status."""
        self.history.add(Ending(time.monotonic(), self.name))
        async with asyncio.timeout(self._patience.call):
            while True:
                try:
                    answer = await self._send("DELETE", None, on)
                except (httpx2.TransportError, TimeoutError):
                    await asyncio.sleep(PAUSE)
                    continue
                if answer.status_code != 503:
                    self.ended = True
                    return answer.status_code

    async def ping(self, on: Target | None = None) -> int:
        """The status that the session has on this node."""
        message = {"jsonrpc": "2.0", "id": next(self._ids), "method": "ping"}
        return (await self._send("POST", message, on)).status_code

    # ---- the standalone stream

    def listen(self) -> None:
        """Reads the standalone stream from now on, over as many connections as it takes."""
        self._listening = self._spawn(self._listen())

    async def has(self, token: str, call: Call | None = None, *, or_restart: bool = False) -> None:
        """Returns once a call's stream, by default the standalone one, brought a message with this token.

        With `or_restart` also if the standalone stream was begun anew meanwhile.
        """
        messages, restarts = (call or self._standalone).messages, self._restarts

        def there() -> bool:
            found = any((message.get("params") or {}).get("message") == token for message in messages)
            return found or (or_restart and self._restarts != restarts)

        async with self._seen:
            await self._seen.wait_for(there)

    async def catch_up(self) -> bool:
        """Sends something on the standalone stream and waits until it arrives: all before it has then arrived.

        Whether the session lived long enough, and it did.
        """
        while not self.ended and not self.gone:
            restarts, began = self._restarts, time.monotonic()
            fence = self.call("announce", steps=1, standalone=True, pause=0.0)
            terminal = await fence.end()
            if terminal is None or "result" not in terminal:
                await asyncio.sleep(PAUSE)
                continue
            if not await self._arrives(f"{fence.label}:1:1", began):
                if self.gone or self.history.lost_since(began):
                    continue
                self.history.add(GaveUp(time.monotonic(), self.name, fence.label, "hung"))
                return False
            if self._restarts != restarts:
                continue  # a connection that broke too soon may have carried it
            self.history.add(Caught(time.monotonic(), self.name))
            return True
        return False

    async def _arrives(self, token: str, sent: float) -> bool:
        """Whether it comes in time. It is not waited for when the store may have lost it."""
        until = time.monotonic() + self._patience.call
        while time.monotonic() < until and not self.gone:
            try:
                async with asyncio.timeout(FENCE_SECONDS):
                    await self.has(token, or_restart=True)
                return True
            except TimeoutError:
                if self.history.lost_since(sent):
                    return False
        return False

    def reconnect(self) -> None:
        """Breaks the connection to the standalone stream off, and comes back at once."""
        if self._connection is not None:
            self._connection.cancel()

    async def vanish(self, seconds: float) -> None:
        """Goes away for ever, in the middle of what it does. Its session must have ended so many seconds later."""
        self.history.add(Vanished(time.monotonic(), self.name, time.monotonic() + seconds))
        self.ended = True
        await self.close()

    async def close(self) -> None:
        """Stops reading and sending."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _listen(self) -> None:
        came = False
        while not self.ended:
            if came and self._standalone.last is None:
                self.history.add(Restarted(time.monotonic(), self.name))
                self._restarts += 1
                async with self._seen:
                    self._seen.notify_all()
            status = await self._connect()
            came = came or status == 200
            if status == 404:
                return
            if status != 200:
                await asyncio.sleep(PAUSE)

    async def _connect(self) -> int:
        """One connection to the standalone stream, until it ends. Its status; 0 if there was none.

        200 of one that this side broke off: it may have been sent something.
        """
        self._connection = self._spawn(self.resume(self._standalone))
        try:
            await asyncio.wait([self._connection])
        finally:
            self._connection.cancel()
        return 200 if self._connection.cancelled() else self._connection.result()

    # ---- a call

    async def _see_through(self, call: Call, message: dict[str, Any], on: Target | None) -> dict[str, Any] | None:
        why = "hung"
        try:
            async with asyncio.timeout(self._patience.call):
                why = await self._start(call, message, on)
                while not why:
                    if await self.resume(call) == 404:
                        why = "refused"
                    elif call.terminal is None:
                        await asyncio.sleep(PAUSE)
                    if call.terminal is not None:
                        break
        except TimeoutError:
            pass
        if call.terminal is None:
            self.history.add(GaveUp(time.monotonic(), self.name, call.label, why or "hung"))
        call.started.set()
        return call.terminal

    async def _start(self, call: Call, message: dict[str, Any], on: Target | None) -> str:
        """Sends the request and reads its response. Why nothing is left to be done, "" if there may be more to come."""
        while True:
            target = self._target(on)
            sent = time.monotonic()
            heard = False
            try:
                async with self._stream("POST", target, message) as response:
                    heard = True
                    self._answered(sent, "POST", response.status_code, target)
                    if response.status_code != 200:
                        return "refused"
                    await self._read(call, response, target)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                # Nothing was sent: any balancer tries another node.
                on = None
                await asyncio.sleep(PAUSE)
                continue
            except (httpx2.TransportError, TimeoutError, _Cut):
                if not heard and self._retry_unsent(call.label):
                    on = None
                    await asyncio.sleep(PAUSE)
                    continue
            return "done" if call.terminal is not None else ("" if call.last else "lost")

    async def resume(self, call: Call, on: Target | None = None) -> int:
        """One GET for the rest of a stream. Its status; 0 if there was none."""
        target = self._target(on)
        sent = time.monotonic()
        status = 0
        try:
            async with self._stream("GET", target, None, call.last) as response:
                status = response.status_code
                self._answered(sent, "GET", status, target)
                if status == 200:
                    await self._read(call, response, target)
        except (httpx2.TransportError, TimeoutError, _Cut):
            pass
        return status

    async def replay(self, call: Call, on: Target | None = None, *, after: str | None = None) -> None:
        """Reads a finished stream again, after one of its events, on any node. Records what came."""
        if not call.ids or call.terminal is None:
            return
        again = Call(call.label, call.request_id, last=after or self._rng.choice(call.ids), begun=call.begun)
        place = self._place(again.last or "")
        events: list[tuple[Place, dict[str, Any]]] = []
        for _ in range(REPLAYS):
            target = self._target(on)
            ended = await self._replay(again, events, target)
            told = bool(events) and "error" in events[-1][1]
            if ended is False or (ended and (told or again.last == call.ids[-1])):
                self.history.add(Replayed(time.monotonic(), self.name, call.label, place, events, ended, target.name))
                return
            await asyncio.sleep(PAUSE)

    async def _replay(self, call: Call, events: list[tuple[Place, dict[str, Any]]], target: Target) -> bool | None:
        """One connection. Whether the server ended it; None if that was not seen: the node may be down or frozen."""
        try:
            async with self._until_replayed(call), self._stream("GET", target, None, call.last) as response:
                if response.status_code != 200:
                    return None
                async for event_id, data in self._events(response, cuts=False):
                    call.last = event_id or call.last
                    if data:
                        events.append((self._place(event_id), json.loads(data)))
                return True
        except httpx2.TransportError:
            return None
        except TimeoutError:
            return False  # there were signs of life all the time, and no end

    @contextlib.asynccontextmanager
    async def _until_replayed(self, call: Call) -> AsyncGenerator[None]:
        """A `TimeoutError` once no end can be expected any more. A loss may come to be known while this waits."""
        begun = asyncio.get_running_loop().time()
        async with asyncio.timeout_at(begun + REPLAY_SECONDS) as limit:

            def lost() -> None:
                if self.history.lost_since(call.begun):
                    limit.reschedule(begun + LOST_REPLAY_SECONDS)

            # Just before the time is over: then it is known whether something was lost meanwhile.
            look = asyncio.get_running_loop().call_at(begun + 0.9 * REPLAY_SECONDS, lost)
            try:
                yield
            finally:
                look.cancel()

    async def read_rest(self, call: Call, last: str) -> list[dict[str, Any]]:
        """The rest of a stream after an event id, to its end, over as many connections as it takes. Not recorded."""
        rest: list[dict[str, Any]] = []
        async with asyncio.timeout(self._patience.call):
            while not (rest and "method" not in rest[-1]):
                with contextlib.suppress(httpx2.TransportError, TimeoutError):
                    async with self._stream("GET", self._target(None), None, last) as response:
                        async for event_id, data in self._events(response, cuts=False):
                            last = event_id or last
                            if data:
                                rest.append(json.loads(data))
        return rest

    # ---- reading

    async def _read(self, call: Call, response: httpx2.Response, target: Target) -> None:
        if response.headers.get("content-type", "").startswith("application/json"):
            await response.aread()
            self._take(call, None, response.json(), target)
            return
        async for event_id, data in self._events(response):
            if event_id:
                call.last = event_id
                call.ids.append(event_id)
                call.started.set()
            if data:
                place = self._place(event_id) if event_id else None
                self._take(call, place, json.loads(data), target)
                async with self._seen:
                    self._seen.notify_all()

    def _take(self, call: Call, place: Place | None, message: dict[str, Any], target: Target) -> None:
        self.history.add(Got(time.monotonic(), self.name, call.label, place, message, target.name))
        call.messages.append(message)
        if "method" not in message:
            call.terminal = call.terminal or message
        elif "id" in message and not self.deaf:
            self._spawn(self._reply(message))

    async def _events(self, response: httpx2.Response, *, cuts: bool = True) -> AsyncGenerator[tuple[str, bytes], None]:
        """The events that arrive in full: id and data. The connection is cut at a random byte now and then.

        Raises:
            _Cut: It was.
        """
        budget = self._rng.randrange(1500) if cuts and self._rng.random() < self._cuts else None
        buffer = b""
        async for chunk in response.aiter_raw():
            if budget is not None:
                chunk, budget = chunk[:budget], budget - len(chunk)
            buffer += chunk.replace(b"\r\n", b"\n")
            while b"\n\n" in buffer:
                block, buffer = buffer.split(b"\n\n", 1)
                fields = dict(line.split(b": ", 1) for line in block.split(b"\n") if b": " in line)
                if b"retry" in fields:
                    self.retry.append(fields[b"retry"].decode())
                if b"id" in fields or b"data" in fields:
                    yield fields.get(b"id", b"").decode(), fields.get(b"data", b"")
            if budget is not None and budget <= 0:
                raise _Cut

    def _place(self, event_id: str) -> Place:
        parsed = parse_event_id(event_id, self.id)
        # An id of another session does not parse; the oracle then sees a stream that is nobody's.
        return Place(-1, -1) if parsed is None else Place(parsed.stream, parsed.cursor.position)

    # ---- replies

    async def _reply(self, request: dict[str, Any]) -> None:
        token = token_of(request)
        assert token is not None
        values = [f"{token.label}:{token.step}:{n}" for n in range(2 if self._rng.random() < self._cuts else 1)]
        await asyncio.gather(*(self._send_reply(request, token.label, token.step, value) for value in values))

    async def _send_reply(self, request: dict[str, Any], label: str, step: int, value: str) -> None:
        result = {"action": "accept", "content": {"value": value}}
        # Before it is sent: it may arrive though nobody hears of it.
        self.history.add(Replied(time.monotonic(), self.name, label, step, value, None))
        await self._insist({"jsonrpc": "2.0", "id": request["id"], "result": result}, None)

    # ---- HTTP

    async def _insist(self, message: dict[str, Any], on: Target | None) -> int | None:
        try:
            async with asyncio.timeout(self._patience.call):
                while not self.ended:
                    try:
                        answer = await self._post(message, on)
                    except (httpx2.TransportError, TimeoutError):
                        on = None
                        await asyncio.sleep(PAUSE)
                        continue
                    if answer.status_code != 503:
                        return answer.status_code
                    await asyncio.sleep(PAUSE)
        except TimeoutError:
            pass
        return None

    async def _post(self, message: dict[str, Any], on: Target | None) -> httpx2.Response:
        return await self._send("POST", message, on)

    async def _send(self, method: str, message: dict[str, Any] | None, on: Target | None) -> httpx2.Response:
        target = self._target(on)
        sent = time.monotonic()
        response: httpx2.Response
        async with self._stream(method, target, message) as response:
            await response.aread()
        if self.id:
            self._answered(sent, method, response.status_code, target)
        return response

    def _target(self, on: Target | None) -> Target:
        return on or self._lure() or self._rng.choice(self.targets)

    def _answered(self, sent: float, method: str, status: int, target: Target) -> None:
        self.gone = self.gone or status == 404
        self.history.add(Answered(time.monotonic(), sent, self.name, method, status, target.name))

    def _stream(self, method: str, target: Target, message: dict[str, Any] | None, last: str | None = None) -> Any:
        headers = {**HEADERS}
        if self.id:
            headers |= {"mcp-session-id": self.id, "mcp-protocol-version": VERSION}
        if last is not None:
            headers["last-event-id"] = last
        timeout = httpx2.Timeout(self._patience.idle, connect=1.0)
        return self._http.stream(method, target.url, json=message, headers=headers, timeout=timeout)

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def error_of(terminal: dict[str, Any] | None) -> dict[str, Any]:
    """The `data` of an error response."""
    assert terminal is not None, "the call has no end"
    assert "error" in terminal, terminal
    data: dict[str, Any] = terminal["error"].get("data") or {}
    return data
