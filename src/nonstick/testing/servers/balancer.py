"""A load balancer without any affinity: every request goes to another node.

An HTTP/1.1 reverse proxy for tests and the demo, on loopback. It is as unhelpful to sessions as a balancer is
allowed to be: a node is picked anew for every request, also on one client connection. Otherwise it is transparent:

* Bodies stream both ways, byte for byte as they come.
* A client that goes away takes its node connection with it, and a node that goes away its client's, abruptly.
* Another node is tried only if a node refuses the connection, so no request is ever sent twice.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Literal, Self

import h11

__all__ = ["Backend", "Balancer", "Exchange"]

_CHUNK: Final = 64 * 1024
_PEEK: Final = 64 * 1024
"""The largest request body that is parsed for `Exchange.message`."""

_HOP_BY_HOP: Final = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"upgrade"})

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backend:
    """A node: its name, and where it listens."""

    name: str
    port: int
    host: str = "127.0.0.1"


@dataclass(slots=True)
class Exchange:
    """One request and what became of it.

    Attributes:
        method: HTTP method.
        path: Path and query.
        request_headers: Lower-case names.
        message: The JSON-RPC message in the body, if it is one object of at most 64 KiB.
        backend: Name of the node, "" if none took it.
        status: HTTP status, 0 until the node answers.
        response_headers: Lower-case names.
        first: Seconds until the status came.
        total: Seconds until the response ended, whichever way; None until then.
        complete: The response ended as it should, not by a lost connection.
    """

    method: str
    path: str
    request_headers: dict[str, str]
    message: dict[str, Any] | None = None
    backend: str = ""
    status: int = 0
    response_headers: dict[str, str] = field(default_factory=dict[str, str])
    first: float = 0.0
    total: float | None = None
    complete: bool = False

    @property
    def rpc(self) -> str | None:
        """The JSON-RPC method, "response" for the client's answer to the server, None without a message."""
        return None if self.message is None else str(self.message.get("method", "response"))

    @property
    def content_type(self) -> str:
        """Without parameters; "" if there is none."""
        return self.response_headers.get("content-type", "").partition(";")[0].strip()


Observer = Callable[[Exchange], None]


class Balancer:
    """Listens on a free loopback port while entered; `url` says where.

    Args:
        backends: May be changed while it runs, through `backends`.
        pick: "round-robin", or "random" from `seed`.
        observe: Called twice for each exchange: when its status is known, with `total` None, and when it ended.
            An exchange that no node took is reported once, at its end.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        *,
        pick: Literal["round-robin", "random"] = "round-robin",
        seed: int = 0,
        observe: Observer | None = None,
    ) -> None:
        self.backends = list(backends)
        self.exchanges: list[Exchange] = []
        self._pick = pick
        self._random = random.Random(seed)
        self._turn = 0
        self._observe = observe
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._carried: list[tuple[Exchange, _Peer]] = []

    @property
    def port(self) -> int:
        assert self._server is not None, "the balancer is not entered"
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self, exchange: Exchange) -> None:
        """Drops the client's connection that carries this exchange, abruptly; the node's goes with it.

        Harmless when the exchange has ended.
        """
        for carried, client in self._carried:
            if carried is exchange:
                client.abort()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(_Peer(h11.Connection(h11.SERVER), reader, writer)))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _serve(self, client: _Peer) -> None:
        try:
            while await self._serve_one(client):
                pass
            await client.close()
        except (OSError, h11.ProtocolError) as error:
            _logger.debug("client connection ended: %r", error)
        finally:
            client.abort()

    async def _serve_one(self, client: _Peer) -> bool:
        """Carries one request; returns whether the client's connection can carry another."""
        request = await client.next_event()
        if not isinstance(request, h11.Request):
            return False
        exchange = Exchange(request.method.decode(), request.target.decode("latin-1"), _decoded(request.headers))
        self.exchanges.append(exchange)
        start = time.monotonic()
        try:
            node = await self._connect(exchange)
            if node is None:
                await _refuse(client, request)
                exchange.status = 502
                return False
            carried = (exchange, client)
            self._carried.append(carried)
            try:
                await self._carry(client, node, request, exchange, start)
            finally:
                self._carried = [other for other in self._carried if other is not carried]
                node.abort()
            return client.next_cycle()
        finally:
            exchange.total = time.monotonic() - start
            self._report(exchange)

    async def _connect(self, exchange: Exchange) -> _Peer | None:
        for backend in self._order():
            try:
                reader, writer = await asyncio.open_connection(backend.host, backend.port)
            except ConnectionRefusedError:
                continue
            exchange.backend = backend.name
            return _Peer(h11.Connection(h11.CLIENT), reader, writer)
        return None

    def _order(self) -> Iterator[Backend]:
        """The picked node, then the others in case it refuses."""
        backends = self.backends[:]
        if self._pick == "random":
            self._random.shuffle(backends)
        elif backends:
            turn = self._turn % len(backends)
            backends = backends[turn:] + backends[:turn]
        for backend in backends:
            # Counted for the nodes that refuse too, so that their share does not all go to one neighbour.
            self._turn += 1
            yield backend

    async def _carry(self, client: _Peer, node: _Peer, request: h11.Request, exchange: Exchange, start: float) -> None:
        """Both directions at once, until the response has ended or either side is gone."""
        upload = asyncio.create_task(_upload(client, node, request, exchange))
        download = asyncio.create_task(self._download(client, node, exchange, start))
        try:
            await asyncio.wait({upload, download}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # The upload ends only when the client is gone, or by a failure: the response has no reader then.
            for task in (upload, download):
                task.cancel()
            ends = await asyncio.gather(upload, download, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _download(self, client: _Peer, node: _Peer, exchange: Exchange, start: float) -> None:
        while True:
            event = await node.next_event()
            if isinstance(event, h11.InformationalResponse):
                await client.send(h11.InformationalResponse(status_code=event.status_code, headers=_kept(event)))
            elif isinstance(event, h11.Response):
                exchange.status = event.status_code
                exchange.response_headers = _decoded(event.headers)
                exchange.first = time.monotonic() - start
                self._report(exchange)
                await client.send(h11.Response(status_code=event.status_code, headers=_kept(event)))
            elif isinstance(event, h11.Data):
                await client.send(h11.Data(data=event.data))
            elif isinstance(event, h11.EndOfMessage):
                await client.send(h11.EndOfMessage())
                exchange.complete = True
                return
            else:
                raise ConnectionAbortedError(f"{exchange.backend} went away")

    def _report(self, exchange: Exchange) -> None:
        if self._observe is not None:
            self._observe(exchange)


async def _upload(client: _Peer, node: _Peer, request: h11.Request, exchange: Exchange) -> None:
    """Sends the request on; then waits for the client to go away."""
    headers = [*_kept(request), (b"connection", b"close")]
    event: Any = h11.Request(method=request.method, target=request.target, headers=headers)
    body = bytearray()
    while True:
        try:
            await node.send(event)
        except OSError:
            break  # The node has answered early, or died: the download tells which.
        if isinstance(event, h11.EndOfMessage):
            break
        event = await client.next_event()
        if isinstance(event, h11.Data) and len(body) <= _PEEK:
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            exchange.message = _peek(bytes(body))
        elif not isinstance(event, h11.Data):
            return
    await client.gone()


async def _refuse(client: _Peer, request: h11.Request) -> None:
    body = b"no node takes connections\n"
    headers = [("content-type", "text/plain"), ("content-length", str(len(body))), ("connection", "close")]
    await client.send(h11.Response(status_code=502, headers=headers))
    if request.method != b"HEAD":
        await client.send(h11.Data(data=body))


def _peek(body: bytes) -> dict[str, Any] | None:
    if not body or len(body) > _PEEK:
        return None
    try:
        message = json.loads(body)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _decoded(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}


def _kept(event: h11.Request | h11.Response | h11.InformationalResponse) -> list[tuple[bytes, bytes]]:
    """The headers that go on to the other side."""
    return [(name, value) for name, value in event.headers if name not in _HOP_BY_HOP]


class _Peer:
    """One side of the proxy: a connection and its HTTP state."""

    def __init__(self, http: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._http = http
        self._reader = reader
        self._writer = writer

    async def next_event(self) -> Any:
        """The next h11 event that is not NEED_DATA."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(_CHUNK))
        return event

    async def send(self, event: Any) -> None:
        data = self._http.send(event)
        if data:
            self._writer.write(data)
            await self._writer.drain()

    async def gone(self) -> None:
        """Returns when the other end has closed. What it sends before that is the next request, and is kept."""
        while data := await self._reader.read(_CHUNK):
            self._http.receive_data(data)

    def next_cycle(self) -> bool:
        """Prepares for another request, if both sides of this one are done and nobody asked to close."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def close(self) -> None:
        """Closes once everything is sent."""
        self._writer.close()
        await self._writer.wait_closed()

    def abort(self) -> None:
        """Drops the connection at once, with what is not sent yet. Harmless after `close`."""
        self._writer.transport.abort()
