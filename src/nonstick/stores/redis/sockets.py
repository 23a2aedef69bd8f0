"""Open sockets to Redis-compatible servers: connecting, logging in, and asking on a socket that nobody shares yet."""

from __future__ import annotations

import asyncio
import socket as os_socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, cast

from nonstick.errors import ConfigurationError, StoreUnavailable, StoreUnusable
from nonstick.stores.common import diagnosis
from nonstick.stores.redis.replies import ServerError, is_alive, refusal
from nonstick.stores.redis.url import Address
from nonstick.waiting import background

try:
    import hiredis
except ImportError:
    raise ConfigurationError("the Redis store needs its client packages: pip install 'nonstick[redis]'") from None

__all__ = ["Arg", "Socket", "ask", "ask_each", "discard", "ignore", "open_socket", "pack"]

Arg = str | bytes | int | float

pack = cast("Callable[[tuple[Arg, ...]], bytes]", hiredis.pack_command)
"""The bytes of one command."""

_NOTHING: Final = object()
_GARBAGE: Final = "what answers there does not speak the Redis protocol"

_SPOKEN: Final[dict[diagnosis.Protocol, str]] = {
    "redis": "the store has no TLS on this port: write redis instead of rediss in its URL, or name the port with it",
    "tls": "the store wants TLS on this port: write rediss instead of redis in its URL, or name the port without it",
    "postgres": "what answers there is a PostgreSQL server: write postgresql:// in the store's URL, or another port",
    "http": "what answers there is a web server, no Redis or Valkey: correct host and port in the store's URL",
}


def ignore(_: object) -> None:
    pass


class Socket(asyncio.Protocol):
    """One open socket: writes packed commands, hands every reply to `on_reply`, tells `on_lost` once that it is gone.

    Attributes:
        closed: Done once the socket is closed and `on_lost` has been called.
        heard_at: Loop time at which something last arrived.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.on_reply: Callable[[Any], None] = ignore
        self.on_lost: Callable[[str], None] = ignore
        self.closed: asyncio.Future[None] = loop.create_future()
        self.heard_at = loop.time()
        self._loop = loop
        self._reader = hiredis.Reader(replyError=ServerError, notEnoughData=_NOTHING)
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._reason = ""

    def write(self, packed: bytes) -> None:
        """Sends this command together with all others of the same turn of the event loop: one system call."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(packed)

    def abort(self, reason: str) -> None:
        """Closes the socket without a word: there may be nobody to listen. `on_lost` follows in the next turn."""
        self._reason = self._reason or reason
        if self._transport is not None:
            self._transport.abort()
        elif not self.closed.done():
            self.closed.set_result(None)

    def _flush(self) -> None:
        out, self._out = self._out, []
        # The transport's own buffer is not watched: what is written and unanswered is bounded by the Connection.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        sock: os_socket.socket | None = transport.get_extra_info("socket")
        if sock is not None and sock.family in (os_socket.AF_INET, os_socket.AF_INET6):
            sock.setsockopt(os_socket.IPPROTO_TCP, os_socket.TCP_NODELAY, 1)
            # Keeps the entry of a NAT or load balancer on the way alive while nothing is asked.
            sock.setsockopt(os_socket.SOL_SOCKET, os_socket.SO_KEEPALIVE, 1)
            if hasattr(os_socket, "TCP_KEEPIDLE"):
                sock.setsockopt(os_socket.IPPROTO_TCP, os_socket.TCP_KEEPIDLE, 60)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        reader = self._reader
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _NOTHING:
                self.on_reply(reply)
        except hiredis.ProtocolError:
            self.abort(_GARBAGE)

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_lost(self._reason or (str(exc) if exc else "the store closed the connection"))
        if not self.closed.done():
            self.closed.set_result(None)


async def open_socket(
    address: Address, *, name: str = "", timeout: float, check: Callable[[Socket], Awaitable[object]] | None = None
) -> Socket:
    """A connection that has logged in, selected its database and answered.

    Args:
        check: What else it has to go through, by `ask`, within the same time; raises StoreUnavailable to refuse it.

    Raises:
        StoreUnavailable: None came about within `timeout` seconds. Says why, without any credentials.
    """
    socket = Socket(asyncio.get_running_loop())
    try:
        async with asyncio.timeout(timeout):
            await _connect(socket, address, timeout)
            await _log_in(socket, address, name)
            if check is not None:
                await check(socket)
    except TimeoutError:
        await discard(socket)
        raise StoreUnavailable(f"{address.url} did not answer within {timeout:g} s") from None
    except (StoreUnavailable, asyncio.CancelledError):
        await discard(socket)
        raise
    except Exception as error:
        # Mostly an OSError; a host name that cannot be one is a UnicodeError. Nothing else may leave here: a task that
        # connects in the background would end, and not try again.
        await discard(socket)
        if (why := await _mistake(error, address, timeout)) is not None:
            raise StoreUnusable(why) from error
        raise StoreUnavailable(f"cannot connect to {address.url}: {error}") from error
    return socket


async def _mistake(error: Exception, address: Address, timeout: float) -> str | None:
    """What is wrong with the URL or the server, if that is why there is no connection; None for mere trouble."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return diagnosis.distrust(error, "name its authority with ssl_ca_certs=FILE in the URL")
    if address.path or not isinstance(error, ConnectionError | ssl.SSLError) or isinstance(error, _DOWN):
        return None
    spoken = await _spoken_at(address, timeout / 2)
    if spoken == "tls" and address.tls is not None:
        wanted = await diagnosis.wants_certificate(address.host, address.port, seconds=timeout / 2)
        return _CERTIFICATE if wanted and "ssl_certfile" not in address.tls_options else None
    if spoken is None or (spoken == "redis" and address.tls is None):
        return f"{_GARBAGE}: correct host and port in the store's URL" if str(error) == _GARBAGE else None
    return _SPOKEN[spoken]


_CERTIFICATE: Final = (
    "the store wants a certificate of its clients: name one with ssl_certfile= and its key with ssl_keyfile= in the URL"
)
_DOWN: Final = (ConnectionRefusedError, ConnectionAbortedError)


async def discard(socket: Socket) -> None:
    """Closes a socket that nobody uses yet, or any more."""
    socket.on_lost = ignore
    socket.abort("gave up")
    await asyncio.shield(socket.closed)


async def _connect(socket: Socket, address: Address, timeout: float) -> None:
    loop = asyncio.get_running_loop()
    if address.path:
        await loop.create_unix_connection(lambda: socket, address.path)
    elif address.tls is None:
        await loop.create_connection(lambda: socket, address.host, address.port)
    else:
        opening = background.spawn(loop.create_connection(lambda: socket, address.host, address.port, ssl=address.tls))
        try:
            await asyncio.wait([opening], timeout=timeout / 10)
            # A server without TLS may wait for the end of what it takes for a line.
            if not opening.done() and await _spoken_at(address, timeout / 4) == "redis":
                raise StoreUnusable(_SPOKEN["redis"])
            await opening
        finally:
            opening.cancel()
            await asyncio.wait([opening])


async def _spoken_at(address: Address, seconds: float) -> diagnosis.Protocol | None:
    return await diagnosis.spoken_at(address.host, address.port, seconds=seconds)


async def _log_in(socket: Socket, address: Address, name: str) -> None:
    commands = address.login()
    if name:
        # Only shown by CLIENT LIST: a proxy in between may refuse it.
        commands.insert(-1, ("CLIENT", "SETNAME", name))
    for command, reply in zip(commands, await _exchange(socket, commands), strict=True):
        if isinstance(reply, ServerError) and command[0] != "CLIENT" and not is_alive(reply):
            raise refusal(str(reply))


async def ask(socket: Socket, *command: Arg) -> Any:
    """The reply to one command on a socket that nobody else uses yet.

    Raises:
        StoreUnavailable: The server refused it, or the socket was lost.
    """
    (reply,) = await ask_each(socket, command)
    return reply


async def ask_each(socket: Socket, *commands: tuple[Arg, ...]) -> list[Any]:
    """As `ask`, for several commands that are sent together and run in this order."""
    try:
        replies = await _exchange(socket, commands)
    except ConnectionError as error:
        raise StoreUnavailable(f"lost the connection: {error}") from None
    for reply in replies:
        if isinstance(reply, ServerError):
            raise refusal(str(reply))
    return replies


async def _exchange(socket: Socket, commands: Sequence[tuple[Arg, ...]]) -> list[Any]:
    """The replies to these commands, on a socket that nobody else uses yet."""
    replies: list[Any] = []
    done = asyncio.get_running_loop().create_future()

    def on_reply(reply: Any) -> None:
        replies.append(reply)
        if len(replies) == len(commands) and not done.done():
            done.set_result(None)

    def on_lost(reason: str) -> None:
        if not done.done():
            # One that lets nobody in says why before it closes.
            refused = next((reply for reply in replies if isinstance(reply, ServerError)), None)
            done.set_exception(ConnectionError(reason) if refused is None else refusal(str(refused)))

    if socket.closed.done():
        raise ConnectionError("the store closed the connection")
    socket.on_reply, socket.on_lost = on_reply, on_lost
    for command in commands:
        socket.write(pack(command))
    await done
    return replies
