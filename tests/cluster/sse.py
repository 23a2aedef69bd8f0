"""A client's side of one HTTP response, read event by event under a deadline, or whole."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx2

from nonstick.testing.cluster import Member, Session

DEADLINE = 60.0
"""Seconds that a test waits for something before it fails."""


@dataclass(frozen=True, slots=True)
class Sse:
    """One block of an event stream; `data` is None where there was no such line."""

    id: str | None = None
    event: str | None = None
    data: str | None = None
    retry: int | None = None
    comment: str | None = None

    @property
    def message(self) -> Any:
        """The JSON-RPC message that it carries."""
        assert self.data, f"no message: {self}"
        return json.loads(self.data)

    @classmethod
    def parse(cls, block: str) -> Sse:
        found: dict[str, Any] = {}
        for line in block.splitlines():
            name, _, value = line.partition(":")
            found[name or "comment"] = value.removeprefix(" ")
        if "retry" in found:
            found["retry"] = int(found["retry"])
        return cls(**found)


class Stream:
    """An open response. A task of its own reads it, so that waiting for an event may be given up."""

    def __init__(self, member: Member, method: str, session: Session, message: Any, headers: dict[str, str]) -> None:
        self._request = (member, method, session, message, headers)
        self._blocks: deque[Sse | None] = deque()
        self._arrived = asyncio.Event()
        self._response: asyncio.Future[httpx2.Response] = asyncio.get_running_loop().create_future()
        self.last_id: str | None = None
        """Id of the last event that was taken."""
        self.bytes = 0
        """Of the body, that have arrived."""
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        member, method, session, message, headers = self._request
        try:
            async with member.stream(method, session, message, **headers) as response:
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    await response.aread()
                    self._response.set_result(response)
                    return
                self._response.set_result(response)
                rest = ""
                async for chunk in response.aiter_text():
                    self.bytes += len(chunk)
                    *blocks, rest = (rest + chunk).split("\r\n\r\n")
                    for block in blocks:
                        self._put(Sse.parse(block))
                assert not rest, f"the stream ended in the middle of an event: {rest!r}"
        except BaseException as error:
            if not self._response.done():
                self._response.set_exception(error)
                # Seen here; whoever waits sees it there too.
                self._response.exception()
            raise
        finally:
            self._put(None)

    def _put(self, block: Sse | None) -> None:
        self._blocks.append(block)
        self._arrived.set()

    @property
    def started(self) -> bool:
        """Whether the response's headers have arrived."""
        return self._response.done()

    @property
    def waiting(self) -> bool:
        """Whether a message arrived that was not taken yet."""
        return any(block is not None and block.data for block in self._blocks)

    async def response(self) -> httpx2.Response:
        """The response: its headers, and its body if it is no stream."""
        async with asyncio.timeout(DEADLINE):
            return await asyncio.shield(self._response)

    async def block(self) -> Sse | None:
        """What comes next, comments included; None at the end."""
        async with asyncio.timeout(DEADLINE):
            while not self._blocks:
                self._arrived.clear()
                await self._arrived.wait()
        block = self._blocks.popleft()
        if block is None:
            self._put(None)
        elif block.id is not None:
            self.last_id = block.id
        return block

    async def event(self) -> Sse:
        """The next event, priming included."""
        while (block := await self.block()) is not None:
            if block.comment is None:
                return block
        raise AssertionError("the stream ended")

    async def message(self) -> Any:
        """The next JSON-RPC message. Fails at the end."""
        while not (event := await self.event()).data:
            pass
        return event.message

    async def events(self) -> list[Sse]:
        """All events up to the end."""
        found: list[Sse] = []
        while (block := await self.block()) is not None:
            if block.comment is None:
                found.append(block)
        return found

    async def rest(self) -> list[Any]:
        """All messages up to the end."""
        return [event.message for event in await self.events() if event.data]

    async def answer(self) -> Any:
        """The one message of a plain JSON answer."""
        response = await self.response()
        assert response.headers["content-type"].startswith("application/json"), response.headers
        return json.loads(response.text)

    async def outcome(self) -> Any:
        """The response to the request, whichever way it came."""
        response = await self.response()
        if response.headers["content-type"].startswith("application/json"):
            return json.loads(response.text)
        return (await self.rest())[-1]

    async def close(self) -> None:
        """The client goes: the connection is cut."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, httpx2.HTTPError):
            await self.task


@contextlib.asynccontextmanager
async def posting(member: Member, session: Session, message: Any, **headers: str) -> AsyncIterator[Stream]:
    """A POST under way."""
    stream = Stream(member, "POST", session, message, headers)
    try:
        yield stream
    finally:
        await stream.close()


@contextlib.asynccontextmanager
async def getting(member: Member, session: Session, last_id: str | None = None) -> AsyncIterator[Stream]:
    """A GET under way, from an event id on or without one. Its headers have arrived."""
    stream = Stream(member, "GET", session, None, {} if last_id is None else {"last-event-id": last_id})
    try:
        await stream.response()
        yield stream
    finally:
        await stream.close()
