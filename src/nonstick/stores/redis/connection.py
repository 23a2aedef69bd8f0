"""One multiplexed connection to a Redis-compatible server: a FIFO of futures over hiredis.

All callers of a process share one socket. The server answers in the order in which it was asked, so the n-th reply
belongs to the n-th waiting future, whatever has become of its caller. Rules that everything here keeps:

* A command is written at most once. Whether to repeat one is the caller's decision (an append carries its writer's
  sequence for that).
* A caller that gave up, by a deadline or by cancellation, leaves its place in the FIFO: the reply is dropped when it
  comes, and its neighbours' replies stay theirs.
* A connection on which nothing arrives although commands wait is a black hole, and is torn down.
* What waits is bounded, by number and by bytes. Beyond that a call fails at once.

docs/why/own-redis-connection.md says why this is not redis-py.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn, cast

from nonstick.errors import ConfigurationError, StoreUnavailable, StoreUnusable
from nonstick.stores.common import diagnosis
from nonstick.stores.redis.url import Address
from nonstick.waiting import background

try:
    import hiredis
except ImportError:
    raise ConfigurationError("the Redis store needs its client packages: pip install 'nonstick[redis]'") from None

__all__ = [
    "Connection",
    "Demoted",
    "Forbidden",
    "Redirected",
    "ScriptMissing",
    "TryAgain",
    "UnknownCommand",
    "Wire",
    "ask",
    "ask_each",
    "backoff",
    "discard",
    "is_alive",
    "open_wire",
    "pack",
    "refusal",
]

logger = logging.getLogger("nonstick.store")

Arg = str | bytes | int | float

pack = cast("Callable[[tuple[Arg, ...]], bytes]", hiredis.pack_command)
"""The bytes of one command."""

_NOTHING: Final = object()
_GARBAGE: Final = "what answers there does not speak the Redis protocol"
_ASKING: Final = pack(("ASKING",))
_SWEEP_SECONDS: Final = 0.05
_BACKOFF_SECONDS: Final = 0.05
_MAX_BACKOFF_SECONDS: Final = 1.0

_ADVICE: Final = {
    "LOADING": "the store is still loading its data",
    "READONLY": "the store is a read-only replica: point the URL at the primary",
    "MASTERDOWN": "the store is a replica that has lost its primary",
    "TRYAGAIN": "the store is moving these keys: try again",
    "CLUSTERDOWN": "the store's cluster is down",
    "MOVED": "the store is a member of a Cluster: write redis+cluster:// instead of redis:// in its URL",
    "BUSY": "the store is busy with a slow script",
    "NOREPLICAS": "the store has too few replicas to accept writes",
    "OOM": "the store is out of memory: raise its maxmemory",
    "MISCONF": "the store refuses writes because it cannot save to disk: see the server's log",
    "DENIED": "the store's server is in protected mode, for its own machine only: give it and the URL a password",
    "NOAUTH": "the store wants a login: put user and password into its URL",
    "WRONGPASS": "the store refused the login: check user and password in its URL",
    "NOPERM": "the store's user lacks a permission: docs/stores.md has the ACL line that it needs",
}
# Up to Redis 6.2 an error raised inside a script arrives wrapped: "ERR Error running script … -OOM command not …".
_CODE: Final = re.compile(rf"(?:^|[\s:-])({'|'.join(_ADVICE)})\b")


# "MOVED 3999 127.0.0.1:6381"; the host may be missing, or be an IPv6 address.
_REDIRECTION: Final = re.compile(r"(MOVED|ASK) \d+ (.*):(\d+)$")


class ServerError(Exception):
    """An error reply, as the server wrote it. Does not leave this module."""


class ScriptMissing(StoreUnavailable):
    """The server does not know this script, so it has not run: send the source with EVAL."""


class Redirected(StoreUnavailable):
    """The command has not run: another server of the cluster has its keys.

    Attributes:
        host: "" for the host that answered.
        asking: Only this one command is to be sent there, after ASKING: the slot is being moved (ASK, not MOVED).
    """

    def __init__(self, message: str, host: str, port: int, *, asking: bool) -> None:
        super().__init__(message)
        self.host = host
        self.port = port
        self.asking = asking


class TryAgain(StoreUnavailable):
    """The command has not run: its keys are being moved, and lie on two servers at this moment."""


class Demoted(StoreUnavailable):
    """The command has not run: this server is a replica."""


class Forbidden(StoreUnusable):
    """The command has not run: the user may not run it."""


class UnknownCommand(StoreUnusable):
    """The server has no such command, or has renamed it."""


_KINDS: Final[dict[str, type[StoreUnavailable]]] = {
    "TRYAGAIN": TryAgain,
    "READONLY": Demoted,
    "NOPERM": Forbidden,
    **dict.fromkeys(("DENIED", "NOAUTH", "WRONGPASS"), StoreUnusable),
}

_UNUSABLE: Final = {
    "ERR ACL failure in script": _ADVICE["NOPERM"],
    "ERR AUTH": "the store has no password for this user: check user and password in its URL",
    "ERR Client sent AUTH": "the store has no password: leave it out of the URL",
    "ERR DB index": "the store has no database of that number: correct it in the URL, or see `databases` in the "
    "server's configuration",
    "ERR invalid DB index": "the database in the store's URL is no number that the server takes",
    "ERR SELECT is not allowed in cluster mode": _ADVICE["MOVED"],
    "ERR This instance has cluster support disabled": "the store is one server, no Cluster: write redis:// instead of "
    "redis+cluster:// in its URL",
}
"""By how the server's error begins."""

_UNKNOWN: Final = re.compile(r"ERR unknown (?:sub)?command '?`?([A-Za-z|]{1,40})")

_SPOKEN: Final[dict[diagnosis.Protocol, str]] = {
    "redis": "the store has no TLS on this port: write redis instead of rediss in its URL, or name the port with it",
    "tls": "the store wants TLS on this port: write rediss instead of redis in its URL, or name the port without it",
    "postgres": "what answers there is a PostgreSQL server: write postgresql:// in the store's URL, or another port",
    "http": "what answers there is a web server, no Redis or Valkey: correct host and port in the store's URL",
}


def is_alive(reply: ServerError) -> bool:
    """Whether a PING was answered so: a server that cannot save to disk refuses it, and answers every read."""
    return str(reply).startswith("MISCONF")


def refusal(message: str) -> StoreUnavailable:
    """What to raise for the server's error reply. Says what to do; quotes no argument of the command (P13)."""
    if message.startswith("NOSCRIPT"):
        return ScriptMissing("the store does not know the script")
    if (to := _REDIRECTION.match(message)) is not None:
        # "?" is said by a server that was told to give host names, and knows none.
        return Redirected(_ADVICE["MOVED"], to[2].removeprefix("?"), int(to[3]), asking=to[1] == "ASK")
    if (code := _CODE.search(message)) is not None:
        return _KINDS.get(code[1], StoreUnavailable)(_ADVICE[code[1]])
    for start, advice in _UNUSABLE.items():
        if message.startswith(start):
            return StoreUnusable(advice)
    if (unknown := _UNKNOWN.match(message)) is not None:
        return UnknownCommand(f"the store's server does not know {unknown[1].upper()}, or has it renamed")
    # "ERR unknown command 'X', with args beginning with: …" would quote a payload.
    return StoreUnavailable(f"the store answered: {message.split(', with args', 1)[0][:200]}")


def backoff(failures: int) -> float:
    """Seconds to wait before the next attempt, after that many failures in a row: doubling, capped, jittered."""
    return min(_MAX_BACKOFF_SECONDS, _BACKOFF_SECONDS * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0)  # noqa: S311


def _ignore(_: object) -> None:
    pass


class Wire(asyncio.Protocol):
    """One open socket: writes packed commands, hands every reply to `on_reply`, tells `on_lost` once that it is gone.

    Attributes:
        closed: Done once the socket is closed and `on_lost` has been called.
        heard: Loop time at which something last arrived.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.on_reply: Callable[[Any], None] = _ignore
        self.on_lost: Callable[[str], None] = _ignore
        self.closed: asyncio.Future[None] = loop.create_future()
        self.heard = loop.time()
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
        sock: socket.socket | None = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Keeps the entry of a NAT or load balancer on the way alive while nothing is asked.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)

    def data_received(self, data: bytes) -> None:
        self.heard = self._loop.time()
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


async def open_wire(
    address: Address, *, name: str = "", timeout: float, check: Callable[[Wire], Awaitable[object]] | None = None
) -> Wire:
    """A connection that has logged in, selected its database and answered.

    Args:
        check: What else it has to go through, by `ask`, within the same time; raises StoreUnavailable to refuse it.

    Raises:
        StoreUnavailable: None came about within `timeout` seconds. Says why, without any credentials.
    """
    wire = Wire(asyncio.get_running_loop())
    try:
        async with asyncio.timeout(timeout):
            await _connect(wire, address, timeout)
            await _log_in(wire, address, name)
            if check is not None:
                await check(wire)
    except TimeoutError:
        await discard(wire)
        raise StoreUnavailable(f"{address.url} did not answer within {timeout:g} s") from None
    except (StoreUnavailable, asyncio.CancelledError):
        await discard(wire)
        raise
    except Exception as error:
        # Mostly an OSError; a host name that cannot be one is a UnicodeError. Nothing else may leave here: those who
        # connect in the background would not try again.
        await discard(wire)
        if (why := await _mistake(error, address, timeout)) is not None:
            raise StoreUnusable(why) from error
        raise StoreUnavailable(f"cannot connect to {address.url}: {error}") from error
    return wire


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


async def discard(wire: Wire) -> None:
    """Closes a wire that nobody uses yet, or any more."""
    wire.on_lost = _ignore
    wire.abort("gave up")
    await asyncio.shield(wire.closed)


async def _connect(wire: Wire, address: Address, timeout: float) -> None:
    loop = asyncio.get_running_loop()
    if address.path:
        await loop.create_unix_connection(lambda: wire, address.path)
    elif address.tls is None:
        await loop.create_connection(lambda: wire, address.host, address.port)
    else:
        opening = background.spawn(loop.create_connection(lambda: wire, address.host, address.port, ssl=address.tls))
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


async def _log_in(wire: Wire, address: Address, name: str) -> None:
    commands = address.login()
    if name:
        # Only for whoever looks at CLIENT LIST: a proxy in between may refuse it.
        commands.insert(-1, ("CLIENT", "SETNAME", name))
    for command, reply in zip(commands, await _exchange(wire, commands), strict=True):
        if isinstance(reply, ServerError) and command[0] != "CLIENT" and not is_alive(reply):
            raise refusal(str(reply))


async def ask(wire: Wire, *command: Arg) -> Any:
    """The reply to one command on a wire that nobody else uses yet.

    Raises:
        StoreUnavailable: The server refused it, or the wire was lost.
    """
    (reply,) = await ask_each(wire, command)
    return reply


async def ask_each(wire: Wire, *commands: tuple[Arg, ...]) -> list[Any]:
    """As `ask`, for several commands that are sent together and run in this order."""
    try:
        replies = await _exchange(wire, commands)
    except ConnectionError as error:
        raise StoreUnavailable(f"lost the connection: {error}") from None
    for reply in replies:
        if isinstance(reply, ServerError):
            raise refusal(str(reply))
    return replies


async def _exchange(wire: Wire, commands: Sequence[tuple[Arg, ...]]) -> list[Any]:
    """The replies to these commands, on a wire that nobody else uses yet."""
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

    if wire.closed.done():
        raise ConnectionError("the store closed the connection")
    wire.on_reply, wire.on_lost = on_reply, on_lost
    for command in commands:
        wire.write(pack(command))
    await done
    return replies


class Connection:
    """Calls to one server over one socket, which is opened by the first call and again after a loss.

    Args:
        timeout: Seconds that a call waits for its reply, connecting included, unless it says otherwise. Kept to
            within a twentieth of a second. Also the silence after which waiting commands mean a black hole.
        connect_timeout: Seconds for the socket, TLS and login together.
        max_waiting: Commands that may be unanswered, those given up on included.
        max_bytes: Bytes of these commands.
        open: Gives a wire to the right server instead, where that is to be found out each time; raises
            StoreUnavailable. The address then only names the place in messages.

    Attributes:
        losses: How often an open connection was lost. If it is the same before a command was sent and after its
            reply, what is sent then goes over the very same wire.
    """

    def __init__(
        self,
        address: Address,
        *,
        name: str = "",
        timeout: float = 2.0,
        connect_timeout: float = 2.0,
        max_waiting: int = 10_000,
        max_bytes: int = 64 * 1024 * 1024,
        open: Callable[[], Awaitable[Wire]] | None = None,  # noqa: A002
    ) -> None:
        self._address = address
        self._open = open or (lambda: open_wire(address, name=name, timeout=connect_timeout))
        self.losses = 0
        self._timeout = timeout
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._loop = asyncio.get_running_loop()
        # Future, deadline, size, number of replies to come: one per command whose reply has not come, in the order of
        # writing.
        self._waiting: deque[tuple[asyncio.Future[Any], float, int, int]] = deque()
        self._bytes = 0
        self._backlog: list[bytes] = []
        self._wire: Wire | None = None
        self._given_up: Wire | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._asked = 0.0
        self._failures = 0
        self._failed_at = 0.0
        self._unusable = ""
        self._closed = False

    @property
    def is_idle(self) -> bool:
        """Nothing waits for a reply."""
        return not self._waiting

    async def call(self, *args: Arg, timeout: float | None = None) -> Any:
        """The server's reply to this command: bytes, int, list or None.

        Raises:
            StoreUnavailable: There is none: see the module. The command may have been executed or not, except
                where the server refused it.
        """
        return await self.send(args, timeout)

    def send(self, args: tuple[Arg, ...], timeout: float | None = None, *, asking: bool = False) -> asyncio.Future[Any]:
        """Like `call`, but returns the future of the reply. Commands are executed in the order of the sends.

        With `asking` ASKING goes before it, so that a server which is only just receiving the slot executes it. The
        two are never parted: an ASKING alone would have somebody else's command see half of a session.

        Raises:
            StoreUnavailable: At once, if too much is waiting already, or after `close`.
        """
        packed = _ASKING + pack(args) if asking else pack(args)
        size = len(packed)
        waiting = self._waiting
        if self._closed or len(waiting) >= self._max_waiting or self._bytes + size > self._max_bytes:
            self._refuse()
        now = self._loop.time()
        if not waiting:
            self._asked = now
        future: asyncio.Future[Any] = self._loop.create_future()
        waiting.append((future, now + (self._timeout if timeout is None else timeout), size, 1 + asking))
        self._bytes += size
        if self._wire is not None:
            self._wire.write(packed)
        else:
            self._backlog.append(packed)
            if self._connecting is None:
                self._connecting = background.spawn(self._connect(), name="nonstick-redis-connect")
        if self._timer is None:
            self._timer = background.later(_SWEEP_SECONDS, self._sweep)
        return future

    def reopen(self, reason: str) -> None:
        """Gives the socket up, and with it what waits for replies. The next call opens another."""
        wire = self._wire
        if wire is not None:
            # At once: what is called from here on must not be written to it.
            wire.on_reply = wire.on_lost = _ignore
            wire.abort(reason)
            self._given_up = wire
            self._on_lost(reason)

    async def close(self) -> None:
        """Closes the socket. Whatever still waits fails; nothing is left running."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        wire = self._wire
        if wire is not None:
            wire.abort("the store was closed")
            await wire.closed
        if self._given_up is not None:
            await self._given_up.closed
        self._fail("the store was closed")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self) -> NoReturn:
        if self._closed:
            raise StoreUnavailable("the store was closed")
        raise StoreUnavailable(f"{self._address.url} is too slow: too much is waiting for it")

    async def _connect(self) -> None:
        """Opens the socket, after a pause if that just failed; then everything that waits is written.

        Should it fail, so does what has waited through the whole attempt. What came later gets an attempt of its own:
        it must not fail for a fault that may have been over when it was asked.
        """
        wire: Wire | None = None
        while wire is None and self._waiting:
            if self._failures:
                await asyncio.sleep(self._failed_at + backoff(self._failures) - self._loop.time())
            known = len(self._waiting)
            try:
                wire = await self._open()
            except StoreUnavailable as error:
                self._failures += 1
                self._failed_at = self._loop.time()
                self._unusable = str(error) if isinstance(error, StoreUnusable) else ""
                self._fail(str(error), known, kind=StoreUnusable if self._unusable else StoreUnavailable)
        self._connecting = None
        if wire is not None:
            self._failures = 0
            self._unusable = ""
            self._adopt(wire)

    def _adopt(self, wire: Wire) -> None:
        wire.on_reply, wire.on_lost = self._on_reply, self._on_lost
        self._wire = wire
        self._asked = self._loop.time()
        backlog, waiting = self._backlog, self._waiting
        self._backlog, self._waiting, self._bytes = [], deque(), 0
        for packed, entry in zip(backlog, waiting, strict=True):
            # Nobody waits for it any more and it was never written: leave it so.
            if not entry[0].done():
                self._waiting.append(entry)
                self._bytes += entry[2]
                wire.write(packed)
        # The socket may have died between the login's last reply and here: then nobody has told us.
        if wire.closed.done():
            self._on_lost("the store closed the connection")

    def _on_reply(self, reply: Any) -> None:
        if not self._waiting:
            assert self._wire is not None
            self._wire.abort("the store sent a reply that nobody had asked for")
            return
        future, until, size, replies = self._waiting.popleft()
        if replies > 1:
            self._waiting.appendleft((future, until, size, replies - 1))
            return
        self._bytes -= size
        if isinstance(reply, ServerError):
            self._on_refusal(future, refusal(str(reply)))
        elif not future.done():
            future.set_result(reply)

    def _on_refusal(self, future: asyncio.Future[Any], error: StoreUnavailable) -> None:
        if not future.done():
            future.set_exception(error)
        if isinstance(error, Demoted):
            # The primary is elsewhere now: behind the same name, or where the Sentinels say.
            self.reopen("it is a replica now")

    def _on_lost(self, reason: str) -> None:
        self._wire = None
        self.losses += 1
        if not self._closed:
            logger.warning("lost the connection to %s: %s", self._address.url, reason)
        self._fail(f"lost the connection to {self._address.url}: {reason}")

    def _fail(self, reason: str, count: int | None = None, *, kind: type[StoreUnavailable] = StoreUnavailable) -> None:
        """Ends the wait of the oldest `count` commands, or of all."""
        del self._backlog[:count]
        for _ in range(len(self._waiting) if count is None else count):
            future, _, size, _ = self._waiting.popleft()
            self._bytes -= size
            if not future.done():
                future.set_exception(kind(reason))

    def _late(self) -> StoreUnavailable:
        """What to raise after a deadline. It may be shorter than an attempt to connect: then how the last one ended."""
        if self._unusable:
            return StoreUnusable(self._unusable)
        return StoreUnavailable(f"{self._address.url} did not answer in time")

    def _sweep(self) -> None:
        """Fails what is past its deadline, and tears a black hole down. One timer for all, only while some wait."""
        self._timer = None
        if not self._waiting:
            return
        now = self._loop.time()
        wire = self._wire
        if wire is not None and now - max(wire.heard, self._asked) >= self._timeout:
            wire.abort(f"nothing was heard for {self._timeout:g} s")
        for future, deadline, _, _ in self._waiting:
            if now >= deadline and not future.done():
                future.set_exception(self._late())
        self._timer = background.later(_SWEEP_SECONDS, self._sweep)
