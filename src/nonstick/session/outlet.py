"""Frames on their way to one client, and how far they bring it."""

from __future__ import annotations

from typing import NamedTuple

from starlette.types import Send

from nonstick.core.sse import PING
from nonstick.store import Cursor
from nonstick.waiting.bell import Bell
from nonstick.waiting.deadline import Deadline

__all__ = ["Mark", "Outlet"]


class Mark(NamedTuple):
    """How far a frame brings its client.

    Attributes:
        position: In the session's log.
        heard: In the cluster log.
        losses: How often the store had lost entries of the session's log by then.
    """

    position: int = 0
    heard: Cursor = Cursor(-1)
    losses: int = 0


class Outlet:
    """Frames on their way to one client, which may be slow or gone.

    A producer waits when more than `room` bytes are waiting, so that a slow reader slows its own request down
    and nobody else's. A reader that takes nothing for `patience` seconds is cut off: it can resume (P10).

    Args:
        until_closing: Where the node finds what would keep it from closing.
    """

    def __init__(
        self,
        *,
        room: int = 256 * 1024,
        patience: float = 30.0,
        ping: float = 15.0,
        until_closing: dict[Deadline, None] | None = None,
    ) -> None:
        self._until_closing: dict[Deadline, None] = {} if until_closing is None else until_closing
        self._frames: list[bytes] = []
        self._mark = Mark()
        self.sent = Mark()
        """The mark of the last frame that the connection took."""
        self._waiting = 0
        self._room = room
        self._patience = patience
        self._ping = ping
        self._ended = False
        self._gone = False
        self._changed = Bell()
        self._freed = Bell()

    @property
    def gone(self) -> bool:
        """Nothing more reaches the client through this connection."""
        return self._gone

    @property
    def has_room(self) -> bool:
        """Whether more may be put without waiting."""
        return self._waiting <= self._room

    async def room(self) -> None:
        """Waits until there is room for more, or until nobody reads any more."""
        while not self.has_room and not self._gone and not self._ended:
            await self._freed.rung()

    async def flushed(self) -> None:
        """Waits until the connection took all that was put, or nobody reads any more."""
        while self._waiting and not self._gone:
            await self._freed.rung()

    def put(self, frame: bytes, mark: Mark | None = None) -> None:
        """Takes a frame, and how far it brings the client. Does nothing when the client is gone or the end was put."""
        if self._gone or self._ended:
            return
        self._frames.append(frame)
        self._mark = mark or self._mark
        self._waiting += len(frame)
        self._changed.ring()

    def skip_to(self, mark: Mark) -> None:
        """Advances the client's place without sending anything."""
        if self._gone or self._ended:
            return
        self._mark = mark
        if not self._waiting:
            self.sent = mark

    def end(self) -> None:
        """What was put is the last."""
        self._ended = True
        self._changed.ring()
        self._freed.ring()

    def leave(self) -> None:
        """The client is gone."""
        self._gone = True
        self._changed.ring()
        self._freed.ring()

    async def pump(self, send: Send) -> bool:
        """Writes until the end. Whether all of it was taken by the connection; False if the client is gone."""
        try:
            while True:
                if self._gone:
                    return False
                if self._frames:
                    body = b"".join(self._frames)
                    self._frames.clear()
                    mark = self._mark
                    await self._send(send, body, more=True)
                    self.sent = mark
                    self._waiting -= len(body)
                    self._freed.ring()
                elif self._ended:
                    await self._send(send, b"", more=False)
                    return True
                else:
                    await self._pause(send)
        except TimeoutError:
            return False
        finally:
            self.leave()

    async def _pause(self, send: Send) -> None:
        try:
            with Deadline(self._ping):
                await self._changed.rung()
        except TimeoutError:
            await self._send(send, PING, more=True)

    async def _send(self, send: Send, body: bytes, *, more: bool) -> None:
        deadline = Deadline(self._patience)
        with deadline:
            self._until_closing[deadline] = None
            try:
                await send({"type": "http.response.body", "body": body, "more_body": more})
            finally:
                del self._until_closing[deadline]
