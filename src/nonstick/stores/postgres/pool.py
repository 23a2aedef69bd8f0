"""Connections to PostgreSQL, shared by the calls of one process. Rules that everything here keeps:

* A statement is sent at most once. Whether to repeat one is the caller's decision.
* A caller that is cancelled disturbs nobody: its statement runs on, and its connection is given back in order.
* Nothing is reset between two calls, because no call leaves anything behind in the server's session.
* What waits is bounded, by number and by time. Beyond that a call fails.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from nonstick.errors import ConfigurationError, StoreUnavailable, StoreUnusable
from nonstick.stores.common import diagnosis
from nonstick.stores.common.backoff import backoff
from nonstick.stores.postgres.url import Address
from nonstick.waiting import background

try:
    import asyncpg
except ImportError:
    raise ConfigurationError("a PostgreSQL store needs its driver: pip install 'nonstick[postgres]'") from None

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

__all__ = ["STANDBY", "TROUBLE", "Pool", "SchemaMissing", "connect", "connected", "refusal"]

T = TypeVar("T")

_STATEMENTS: Final = 50
_CLOSE_SECONDS: Final = 1.0
_IDLE_SECONDS: Final = 60.0
"""After this time unused a connection is closed: the network may have forgotten it, and the server has others."""

STANDBY: Final = "standby"
"""Name of the column by which an answer tells that a hot standby gave it."""

TROUBLE: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
    StoreUnusable,
)
"""What the driver raises when it cannot do what it was told, and what `connect` raises where it knows the cause."""

_ADVICE: Final = {
    "08": "the connection to the store was lost",
    "25006": "the store is a standby or read-only: point the URL at the primary (target_session_attrs=read-write)",
    "26": "a pooler stands before the store that does not know prepared statements: put prepared=false into its URL",
    "28": "the store refused the login: check user and password in its URL, and the server's pg_hba.conf",
    "3D000": "the store's database does not exist: create it, or correct the URL",
    "40": "the store could not do this beside other transactions; its default isolation must be read committed",
    "42P05": "a pooler stands before the store that does not know prepared statements: put prepared=false into its URL",
    "42501": "the store's user lacks a permission: let it create the schema, or grant it USAGE on the schema, EXECUTE "
    "on its functions, and all rights on its tables",
    "53100": "the store's disk is full",
    "53200": "the store is out of memory",
    "53300": "the store has no connection left: lower pool_size, raise the server's max_connections, or use a pooler",
    "53": "the store is out of resources",
    "55P03": "the store waited too long for a lock",
    "57014": "the store's server cancelled the call: see its statement_timeout",
    "57P01": "the store's server is shutting down, or an administrator closed the connection",
    "57P02": "the store's server has crashed and recovers",
    "57P03": "the store's server is starting up, shutting down or recovering",
    "57P05": "the store's server closed an idle session: see its idle_session_timeout",
    "58": "the store's server cannot read or write its files: see its log",
    "XX001": "the store's data are damaged: see the server's log",
    "XX002": "the store's data are damaged: see the server's log",
}
"""By SQLSTATE, or by its class."""

_UNUSABLE: Final = ("28", "3D000", "42501")
"""Those of them that remain until somebody changes something."""

_MISSING: Final = ("3F000", "42P01", "42883")
_WRONG_SERVER: Final = ("25006", "57P01", "57P02", "57P03")


class SchemaMissing(StoreUnavailable):
    """The statement named something that is not there, so it has not run."""


def refusal(error: BaseException) -> StoreUnavailable:
    """What to raise for the driver's error. Says what to do; quotes nothing of what was sent, nor the URL (P13)."""
    if isinstance(error, StoreUnavailable):
        return error
    if isinstance(error, ConfigurationError):
        return StoreUnusable(str(error))
    code = getattr(error, "sqlstate", None)
    if isinstance(error, TimeoutError):
        return StoreUnavailable("the store did not answer in time")
    if code in _MISSING:
        return SchemaMissing("the store's tables or functions are not there")
    if isinstance(code, str) and (advice := _ADVICE.get(code) or _ADVICE.get(code[:2])):
        return StoreUnusable(advice) if code.startswith(_UNUSABLE) else StoreUnavailable(advice)
    if isinstance(code, str):
        # Neither message nor detail: they may quote a payload.
        return StoreUnavailable(f"the store answered with an error: {type(error).__name__} ({code})")
    if isinstance(error, OSError):
        return StoreUnavailable(f"the store cannot be reached: {error.strerror or type(error).__name__}")
    return StoreUnavailable(f"the connection to the store failed: {type(error).__name__}")


async def connect(address: Address, *, timeout: float) -> Connection:
    """A new connection.

    Raises:
        ConfigurationError: The driver cannot make sense of the URL.
        One of TROUBLE: It cannot be reached, or refuses.
    """
    patience = timeout if address.connect_timeout is None else min(timeout, address.connect_timeout)
    try:
        return await asyncpg.connect(
            address.dsn,
            # What is left is for finding out what answers there, if nothing does in time.
            timeout=patience * _CONNECT_SHARE,
            ssl=ssl.create_default_context() if address.system_authorities else None,
            statement_cache_size=_STATEMENTS if address.prepared else 0,
            max_cached_statement_lifetime=0,
            server_settings={} if address.names_application else {"application_name": address.schema},
        )
    except asyncpg.exceptions.ClientConfigurationError as error:
        raise ConfigurationError(f"the store URL has options that cannot work: {_first_sentence(error)}") from None
    except (asyncpg.UndefinedObjectError, asyncpg.InvalidParameterValueError) as error:
        # The value may be anything, and the message quotes that too.
        name = re.search(r'parameter "([\w.]+)"', str(error))
        which = name[1] if name else "it is named in the server's log"
        raise StoreUnusable(f"the store's server refuses a setting in the URL, or in its options: {which}") from None
    except (OSError, TimeoutError) as error:
        if (why := await _mistake(error, address, patience)) is not None:
            raise StoreUnusable(why) from None
        raise


_CONNECT_SHARE: Final = 0.75


def _first_sentence(error: asyncpg.exceptions.ClientConfigurationError) -> str:
    """Of the driver's message: it names the option, and what that may be. What stands in quotes may be the URL's."""
    if "root certificate" in str(error):
        return (
            "to check the server's certificate, name its authority with sslrootcert=FILE, or all that this machine "
            "trusts with sslrootcert=system"
        )
    return re.sub(r"(?<!`)(['\"]).*?\1", "…", str(error).partition("\n")[0])


async def _mistake(error: OSError, address: Address, timeout: float) -> str | None:
    """What is wrong with the URL or the server, if that is why there is no connection; None for mere trouble."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return diagnosis.distrust(error, "name its authority with sslrootcert=FILE in the URL")
    if address.server is None or isinstance(error, ConnectionRefusedError | socket.gaierror):
        return None
    spoken = await diagnosis.spoken_at(*address.server, seconds=timeout * (1 - _CONNECT_SHARE))
    if spoken == "postgres" and "rejected SSL upgrade" in str(error):
        return (
            "the store's server has no TLS, which sslmode in the URL demands: turn TLS on there (ssl = on), "
            "or write sslmode=prefer or sslmode=disable"
        )
    return _SPOKEN.get(spoken)


_SPOKEN: Final[dict[diagnosis.Protocol | None, str]] = {
    "redis": "what answers there is a Redis or Valkey server: write redis:// in the store's URL, or another port",
    "http": "what answers there is a web server, no PostgreSQL: correct host and port in the store's URL",
    "tls": "what answers there speaks TLS and is no PostgreSQL: correct host and port in the store's URL; if it is a "
    "PostgreSQL behind a TLS proxy, add sslnegotiation=direct and sslmode=require",
}


@asynccontextmanager
async def connected(address: Address, *, timeout: float) -> AsyncIterator[Connection]:
    """A connection for a short while. Raises as `connect`."""
    connection = await connect(address, timeout=timeout)
    try:
        yield connection
    finally:
        connection.terminate()


class Pool:
    """Up to `size` connections, made when they are needed. The one used last is the first to be used again.

    Args:
        timeout: Seconds that a call may take: waiting for a connection, connecting and the answer.
        max_waiting: Calls that may be under way at once; beyond that they fail immediately (P10).
    """

    def __init__(self, address: Address, *, timeout: float, max_waiting: int) -> None:
        self._address = address
        self._timeout = timeout
        self._max_waiting = max_waiting
        self._loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(address.pool_size)
        self._idle: list[tuple[Connection, float]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        self._failures = 0
        self._retry_at = 0.0
        self._refused = StoreUnavailable()

    async def fetch(
        self, query: str, *args: object, done: Callable[[list[asyncpg.Record]], None] | None = None
    ) -> list[asyncpg.Record]:
        """The statement's rows. `done` gets them too, even when the caller has been cancelled since.

        A hot standby lags behind: what it lacks may be there, what it has may be gone. Its answers are not used (P9).
        """

        async def work(connection: Connection) -> list[asyncpg.Record]:
            rows = await connection.fetch(query, *args)
            if rows and rows[0].get(STANDBY):
                raise asyncpg.ReadOnlySQLTransactionError("a standby")
            if done is not None:
                done(rows)
            return rows

        return await self.use(work)

    async def use(self, work: Callable[[Connection], Awaitable[T]], *, timeout: float | None = None) -> T:
        """What `work` returns, which gets a connection to itself.

        Raises:
            StoreUnavailable: It failed, or there was not enough time.
        """
        if self._closed:
            raise RuntimeError("the store is closed")
        if len(self._tasks) >= self._max_waiting:
            raise StoreUnavailable("too many calls wait for the store")
        task = self._loop.create_task(self._use(work, self._timeout if timeout is None else timeout))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        # The statement is sent or about to be. To stop it would cost the connection, and tell nobody what has happened.
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # if its caller was cancelled, nobody else takes it

    def close_idle(self) -> None:
        """Closes what nobody has used for a while."""
        before = self._loop.time() - _IDLE_SECONDS
        while self._idle and self._idle[0][1] < before:
            self._discard(self._idle.pop(0)[0])

    async def close(self) -> None:
        """Waits for the calls that are under way, until their deadline at most, and closes every connection."""
        self._closed = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._timeout)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._drop_idle()
        if self._closing:
            await asyncio.wait(self._closing)

    async def _use(self, work: Callable[[Connection], Awaitable[T]], timeout: float) -> T:
        try:
            async with asyncio.timeout(timeout), self._slots:
                connection = await self._connection()
                try:
                    result = await work(connection)
                except BaseException as error:
                    self._take_back(connection, error)
                    raise
                self._idle.append((connection, self._loop.time()))
                return result
        except TROUBLE as error:
            raise refusal(error) from None

    async def _connection(self) -> Connection:
        """An idle connection, or a new one. After a failure to connect, calls are refused for a while."""
        while self._idle:
            connection, _ = self._idle.pop()
            if not connection.is_closed():
                return connection
        if self._loop.time() < self._retry_at:
            raise type(self._refused)(*self._refused.args)
        self._failures += 1
        try:
            connection = await background.spawn(connect(self._address, timeout=self._timeout))
        except BaseException as error:
            # Calls in the meantime get the same answer: a server in trouble is not to be asked by each of them.
            self._refused = refusal(TimeoutError() if isinstance(error, asyncio.CancelledError) else error)
            self._retry_at = self._loop.time() + backoff(self._failures - 1)
            raise
        self._failures = 0
        return connection

    def _take_back(self, connection: Connection, error: BaseException) -> None:
        """After a failure: where the server has answered with an error, the connection itself is in order."""
        if getattr(error, "sqlstate", None) in _WRONG_SERVER:
            # The others lead there too, and a new connection may find another server.
            self._drop_idle()
            self._discard(connection)
        elif (
            isinstance(error, asyncpg.PostgresError)
            and not connection.is_closed()
            and not connection.is_in_transaction()
        ):
            self._idle.append((connection, self._loop.time()))
        else:
            self._discard(connection)

    def _drop_idle(self) -> None:
        while self._idle:
            self._discard(self._idle.pop()[0])

    def _discard(self, connection: Connection) -> None:
        task = background.spawn(_close(connection))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _close(connection: Connection) -> None:
    """Closes it in order, if the server still listens: it hears too that a statement need not go on."""
    try:
        await connection.close(timeout=_CLOSE_SECONDS)
    except TROUBLE:
        connection.terminate()
