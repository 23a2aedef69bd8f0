"""A bad network between a client and a server, with a verb for each fault."""

from __future__ import annotations

import asyncio
import socket
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from types import TracebackType
from typing import Final, Self
from urllib.parse import SplitResult, urlsplit

__all__ = ["FaultProxy"]

_CHUNK: Final = 65536


class FaultProxy:
    """A TCP proxy in this event loop, in front of the server at `target`; healthy until told otherwise.

    An async context manager. Clients connect to `url`; its port stays reserved while connections are refused. What
    is said to it takes effect at once, for open connections too. Do not block the event loop on a client of it.

    Args:
        target: URL of any scheme that names a host and a port.
    """

    def __init__(self, target: str) -> None:
        self._parts, self._target = _parse(target)
        self._reserved: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], _Link] = {}
        self._requests = asyncio.Event()
        self._replies = asyncio.Event()
        self._requests.set()
        self._replies.set()
        self._delay = 0.0
        self._doom = 0
        self._doom_after = b""
        self.port = 0

    @property
    def url(self) -> str:
        """The target's URL, by way of this proxy."""
        user, at, _ = self._parts.netloc.rpartition("@")
        return self._parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}").geturl()

    @property
    def connections(self) -> int:
        """How many client connections are open."""
        return len(self._links)

    async def __aenter__(self) -> Self:
        # This socket never listens: it keeps the port ours, so that a client of a cut proxy is refused for certain.
        self._reserved = _bound(0)
        self.port = self._reserved.getsockname()[1]
        await self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await asyncio.sleep(0)  # connections that were just accepted become known
        await self.cut()
        if self._reserved is not None:
            self._reserved.close()

    # ---- verbs

    async def cut(self) -> None:
        """Resets every connection, and refuses new ones until `heal`."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.reset()

    async def lead_to(self, target: str) -> None:
        """From now on the server at this URL is the one behind: a failover. Connections to the other are reset."""
        self._parts, self._target = _parse(target)
        await self.reset()

    async def reset(self) -> None:
        """Resets every connection once; new ones are served as before."""
        tasks = list(self._links)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def heal(self) -> None:
        """Ends every fault. What a black hole has held is delivered now, late, as a network does."""
        self._delay = 0.0
        self._doom = 0
        self._requests.set()
        self._replies.set()
        if self._server is None:
            await self._listen()

    def black_hole(self, *, requests: bool = True, replies: bool = True) -> None:
        """Accepts connections and bytes, and forwards nothing in these directions until `heal`."""
        if requests:
            self._requests.clear()
        if replies:
            self._replies.clear()

    def drop_replies(self, count: int, *, after: bytes = b"") -> None:
        """Loses the answers to the next `count` requests that hold the bytes `after`.

        The server receives each of them in full and executes it; the client's connection is reset in place of the
        next bytes that the server sends.
        """
        self._doom = count
        self._doom_after = after

    def lose_next_reply(self, *, after: bytes = b"") -> None:
        """`drop_replies(1)`."""
        self.drop_replies(1, after=after)

    @property
    def replies_to_lose(self) -> int:
        """How many of the answers named by `drop_replies` have not been asked for yet."""
        return self._doom

    def delay(self, seconds: float) -> None:
        """Every piece, in both directions, arrives this much later."""
        self._delay = seconds

    # ---- the pipes

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, sock=_bound(self.port))

    def _accept(self, reader: StreamReader, writer: StreamWriter) -> None:
        link = _Link(reader, writer)
        if self._server is None:  # cut between the handshake and here
            link.abort()
            return
        task = asyncio.ensure_future(self._serve(link))
        self._links[task] = link
        task.add_done_callback(self._links.pop)

    async def _serve(self, link: _Link) -> None:
        try:
            await self._requests.wait()
            link.from_server, link.to_server = await asyncio.open_connection(*self._target)
            await self._forward(link)
            if link.doomed:
                await _finish_upstream(link)
        except OSError:
            pass  # either side went away: this connection is over
        finally:
            link.abort()

    async def _forward(self, link: _Link) -> None:
        """Both ways, until either side closes."""
        both = {asyncio.ensure_future(self._forward_requests(link)), asyncio.ensure_future(self._forward_replies(link))}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _forward_requests(self, link: _Link) -> None:
        assert link.to_server is not None
        while data := await link.from_client.read(_CHUNK):
            await self._requests.wait()
            await self._lag()
            if self._doom and self._doom_after in data:
                self._doom -= 1
                link.doomed = True
            link.to_server.write(data)
            await link.to_server.drain()

    async def _forward_replies(self, link: _Link) -> None:
        assert link.from_server is not None
        while data := await link.from_server.read(_CHUNK):
            if link.doomed:
                return
            await self._replies.wait()
            await self._lag()
            link.to_client.write(data)
            await link.to_client.drain()

    async def _lag(self) -> None:
        if self._delay:
            await asyncio.sleep(self._delay)


class _Link:
    """One client's connection and, once it is made, the one to the server."""

    def __init__(self, from_client: StreamReader, to_client: StreamWriter) -> None:
        self.from_client = from_client
        self.to_client = to_client
        self.from_server: StreamReader | None = None
        self.to_server: StreamWriter | None = None
        self.doomed = False

    def abort(self) -> None:
        for writer in (self.to_client, self.to_server):
            if writer is not None:
                writer.transport.abort()


async def _finish_upstream(link: _Link) -> None:
    """Lets the server read the whole of what was forwarded: a reset might throw away what it has not read yet."""
    assert link.from_server is not None
    assert link.to_server is not None
    link.to_client.transport.abort()
    with suppress(OSError):
        link.to_server.write_eof()
        while await link.from_server.read(_CHUNK):
            pass


def _parse(target: str) -> tuple[SplitResult, tuple[str, int]]:
    parts = urlsplit(target)
    if parts.hostname is None or parts.port is None:
        raise ValueError("FaultProxy needs a URL with a host and a port")
    return parts, (parts.hostname, parts.port)


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", port))
    return bound
