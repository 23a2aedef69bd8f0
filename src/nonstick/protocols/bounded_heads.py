"""HTTP heads that are too long, or never end, under `nonstick serve` (P10).

An ASGI application sees a request once its head is whole. Until then only the server can bound the head, and uvicorn's
fast protocol (httptools) does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["HEAD_BYTES", "HEAD_SECONDS", "BoundedHeads"]

HEAD_BYTES: Final = 64 * 1024
"""About how long a head may be that did not come in one piece. uvicorn's other protocol has the same bound."""

HEAD_SECONDS: Final = 60.0
"""How long a client may take to send a head, or leave a connection without a word that it opened."""

_TOO_LONG: Final = b"Request Header Fields Too Large: the headers are too long"
_ANSWER: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_TOO_LONG), _TOO_LONG)
)


class BoundedHeads(HttpToolsProtocol):
    """uvicorn's protocol, which gives up on a head that is longer than `HEAD_BYTES` or takes `HEAD_SECONDS`.

    Nothing is counted, and no timer runs, for a head that comes in one piece.
    """

    _size = 0
    _timer: asyncio.TimerHandle | None = None
    _begun: object = None
    """The request whose head is not whole yet."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # A request has a scope from its first byte on, and a method in it once its head is whole.
        scope = cast("Mapping[str, object] | None", self.scope)
        if scope is None:
            return
        if "method" not in scope:
            self._count(scope, len(data))
        elif self._timer is not None:
            self._arrived()

    def _count(self, scope: object, size: int) -> None:
        """A part of a head came, and not its end."""
        if scope is not self._begun:
            if self._begun is not None:
                self._arrived()
            self._begun, self._size = scope, 0
        self._size += size
        if self._size <= HEAD_BYTES or self.transport.is_closing():
            self._expect()
            return
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_ANSWER)
        self.transport.close()

    def _expect(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _arrived(self) -> None:
        self._begun = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()
