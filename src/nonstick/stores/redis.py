"""Sessions in Redis or Valkey (standalone, 6.2 or newer): every method is one round trip and one script.

A script runs alone and whole on the server: that is where the protocol's atomicity comes from. shared.lua describes
the three keys of a session. Their names carry the session's key in braces, so that a Cluster keeps them together:

    prefix:{key}:r    the record            prefix:n:<node>     a node's lease
    prefix:{key}:w    the append's books    prefix:g:<group>    sorted set of a group's sessions, by expiry
    prefix:{key}:l    the log               prefix:{key}:c<db>  pub/sub channel (which has no database of its own)

An append publishes its events to the session's channel, whole where they are small. The server has to keep
`maxmemory-policy noeviction`: others drop one key of a session and not the rest. A log that is not what its record
says is reported as `Diverged`, never read as empty (P9).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import resources
from types import TracebackType
from typing import Any, Final, NamedTuple, NoReturn, Self

from nonstick.errors import (
    AlreadyExists,
    ConfigurationError,
    Diverged,
    Fenced,
    NotPending,
    SessionNotFound,
    StoreUnavailable,
    StreamClosed,
    TooManySessions,
    Trimmed,
)
from nonstick.examine import Finding
from nonstick.store import (
    CANCEL_SECONDS,
    FRESH_SHARE,
    MAX_CANCELS,
    MAX_READ,
    NEW_STREAM,
    WRITER_SECONDS,
    Appended,
    Batch,
    Cursor,
    Event,
    Lease,
    Loaded,
    Wake,
)
from nonstick.stores import redis_examine
from nonstick.stores.redis_pubsub import Subscriber
from nonstick.stores.redis_url import Address
from nonstick.stores.resp import Arg, Connection, ScriptMissing

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError:
    raise ConfigurationError("the Redis store needs its client packages: pip install 'nonstick[redis]'") from None

__all__ = ["RedisStore"]

INLINE_BYTES: Final = 8 * 1024
"""Up to this many bytes of event data, an append's wake carries its events."""

LEASE_SECONDS: Final = 2.0
"""How long a lease waits for each step: a node that cannot renew has to find out well within its lease."""

_TOUCHES: Final = 256


class _Script(NamedTuple):
    sha: str
    source: str


def _script(name: str) -> _Script:
    folder = resources.files("nonstick.stores")
    constants = (
        f"local CANCEL_MS, WRITER_MS, INLINE_BYTES = {CANCEL_SECONDS * 1000}, {WRITER_SECONDS * 1000}, {INLINE_BYTES}\n"
        f"local MAX_CANCELS = {MAX_CANCELS}\n"
    )
    source = constants + (folder / "shared.lua").read_text() + (folder / f"{name}.lua").read_text()
    return _Script(hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest(), source)


_CREATE: Final = _script("create")
_LOAD: Final = _script("load")
_TOUCH: Final = _script("touch")
_UPDATE: Final = _script("update")
_DELETE: Final = _script("delete")
_APPEND: Final = _script("append")
_READ: Final = _script("read")
_TRIM: Final = _script("trim")

_REFUSALS: Final = {
    b"gone": SessionNotFound,
    b"exists": AlreadyExists,
    b"closed": StreamClosed,
    b"fenced": Fenced,
    b"not pending": NotPending,
    b"diverged": Diverged,
}
_MESSAGES: Final = {
    b"gone": "no live session has this key",
    b"exists": "a live session has this key",
    b"closed": "the stream has ended or is not known",
    b"fenced": "a later attempt took the stream over",
    b"not pending": "the request is not in the session's pending set",
    b"diverged": "the store lost the entry at the cursor, entries after it, or appends of this writer",
}


class RedisStore:
    """The store protocol over one Redis or Valkey server.

    Args:
        url: `redis://[[user]:password@]host[:port][/db]`, `rediss://` likewise with TLS (with `ssl_ca_certs` and the
            like as query parameters), or `unix:///path/to.sock[?db=1]`: the forms of redis-py.
        prefix: Of all keys and channels. Deployments that share a server need different ones.
        timeout: Seconds that any call waits for its answer, connecting included.
        connect_timeout: Seconds for connecting and logging in.
        max_waiting: Commands that may wait for their answers at once; beyond that calls fail immediately (P10).
        max_bytes: Bytes of these commands.
        heartbeat: Seconds between two proofs of life on the subscription; its silent death is noticed within two.

    Raises:
        ConfigurationError: The URL or the prefix cannot work.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "nonstick",
        timeout: float = 2.0,
        connect_timeout: float = 2.0,
        max_waiting: int = 10_000,
        max_bytes: int = 64 * 1024 * 1024,
        heartbeat: float = 3.0,
    ) -> None:
        if not prefix or not prefix.isascii() or not prefix.isprintable() or set(prefix) & set("{} "):
            raise ConfigurationError("the store's prefix must be visible ASCII without braces")
        self._address = Address.parse(url)
        self._prefix = prefix
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._heartbeat = heartbeat
        self._open: Connection | None = None
        self._subscriber: Subscriber[Sequence[Event]] | None = None

    def __repr__(self) -> str:
        return f"RedisStore({self.url!r}, prefix={self._prefix!r})"

    @property
    def namespace(self) -> str:
        """What sets this deployment's keys apart on the server."""
        return self._prefix

    @property
    def url(self) -> str:
        """Where it is, without any credentials: fit for logs."""
        return self._address.url

    async def __aenter__(self) -> Self:
        if self._open is not None:
            raise RuntimeError("a store is entered once")
        self._open = Connection(
            self._address,
            name=self._prefix,
            timeout=self._timeout,
            connect_timeout=self._connect_timeout,
            max_waiting=self._max_waiting,
            max_bytes=self._max_bytes,
        )
        self._subscriber = Subscriber(
            self._address,
            name=self._prefix,
            prefix=self._prefix,
            decode=_decode_wake,
            publish=lambda channel: self._connection.call("PUBLISH", channel, ""),
            connect_timeout=self._connect_timeout,
            interval=self._heartbeat,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        assert self._subscriber is not None
        await self._subscriber.close()
        await self._connection.close()

    @property
    def _connection(self) -> Connection:
        if self._open is None:
            raise RuntimeError("the store is not open: use `async with RedisStore(...) as store`")
        return self._open

    def _channel(self, key: str) -> str:
        return f"{self._prefix}:{{{key}}}:c{self._address.db}"

    async def _run(self, script: _Script, key: str, *args: Arg) -> Any:
        """The script's answer for this session. A script that the server does not know has not run: send it whole."""
        stem = f"{self._prefix}:{{{key}}}:"
        tail = (3, stem + "r", stem + "w", stem + "l", *args)
        try:
            reply = await self._connection.call("EVALSHA", script.sha, *tail)
        except ScriptMissing:
            reply = await self._connection.call("EVAL", script.source, *tail)
        if type(reply) is bytes and reply in _REFUSALS:
            raise _REFUSALS[reply](_MESSAGES[reply])
        return reply

    # ---- the record

    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        groups = limits or {}
        reply = await self._run(
            _CREATE,
            key,
            self._prefix,
            key,
            _milliseconds(lifetime),
            len(groups),
            *_flat(groups),
            *_flat(fields),
        )
        if type(reply) is list:
            raise TooManySessions(reply[1].decode())

    async def load(self, key: str) -> Loaded:
        now, pairs = await self._run(_LOAD, key, self._prefix, key, FRESH_SHARE)
        return _loaded(now, pairs)

    async def update(
        self,
        key: str,
        changes: Mapping[str, bytes | None],
        *,
        expect: Mapping[str, bytes | None] | None = None,
        lifetime: float | None = None,
    ) -> bool:
        has, lacks = _split(expect or {})
        sets, removes = _split(changes)
        written = await self._run(
            _UPDATE,
            key,
            self._prefix,
            key,
            0 if lifetime is None else _milliseconds(lifetime),
            len(has),
            len(lacks),
            len(sets),
            len(removes),
            *_flat(has),
            *lacks,
            *_flat(sets),
            *removes,
        )
        return bool(written)

    async def touch(self, keys: Collection[str]) -> None:
        waiting = list(keys)
        while waiting:
            some, waiting = waiting[:_TOUCHES], waiting[_TOUCHES:]
            for outcome in await asyncio.gather(*map(self._touch, some), return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome

    async def _touch(self, key: str) -> None:
        try:
            await self._run(_TOUCH, key, self._prefix, key)
        except SessionNotFound:
            pass

    async def delete(self, key: str) -> bool:
        return bool(await self._run(_DELETE, key, self._prefix, key, self._channel(key)))

    # ---- the log

    async def append(self, key: str, batch: Batch) -> Appended:
        if batch.stream == NEW_STREAM and not batch.events:
            raise ValueError("a stream is opened by its first event")
        sets, removes = _split(batch.fields)
        args: list[Arg] = [
            self._channel(key),
            batch.writer,
            batch.sequence,
            batch.stream,
            batch.attempt,
            ("t" if batch.take_over else "") + ("e" if batch.terminal else ""),
            _optional(batch.answers),
            _optional(batch.settle),
            _optional(batch.cancel),
            _optional(batch.uncancel),
            len(batch.expect),
            len(sets),
            len(removes),
            *batch.expect,
            *_flat(sets),
            *removes,
        ]
        for event in batch.events:
            args += event
        first, duplicate, size, count = await self._run(_APPEND, key, *args)
        return Appended(first, bool(duplicate), size, count)

    async def read(self, key: str, after: Cursor, *, limit: int = 256) -> list[Event]:
        if not 1 <= limit <= MAX_READ:
            raise ValueError(f"limit must be 1 to {MAX_READ}")
        entries = await self._run(_READ, key, after.position, after.tag, limit)
        if entries and entries[0] == b"trimmed":
            raise Trimmed(_position(entries[1]))
        return [Event(_position(name), pairs[1], int(pairs[3]), pairs[5]) for name, pairs in entries]

    async def trim(self, key: str, *, streams: Collection[int] = (), standalone_before: int = 0) -> None:
        try:
            await self._run(_TRIM, key, standalone_before, *streams)
        except SessionNotFound:
            pass

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        if self._subscriber is None:
            raise RuntimeError("the store is not open: use `async with RedisStore(...) as store`")
        return self._subscriber.watch(self._channel(key), wake)

    # ---- nodes and the store itself

    def _lease_key(self, node: str) -> str:
        return f"{self._prefix}:n:{node}"

    def lease(self, node: str) -> Lease:
        return _RedisLease(self._address, self._lease_key(node))

    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        if not nodes:
            return set()
        names = list(nodes)
        values = await self._connection.call("MGET", *map(self._lease_key, names))
        return {name for name, value in zip(names, values, strict=True) if value is None}

    async def ping(self) -> None:
        # A write: a replica, a full memory or a disk that is gone would answer PING as if all were well.
        await self._connection.call("SET", f"{self._prefix}:ping", "", "PX", 1000)

    async def examine(self) -> list[Finding]:
        """See `nonstick.examine.Examinable`."""
        connection = Connection(
            self._address, name=self._prefix, timeout=self._timeout, connect_timeout=self._connect_timeout
        )
        try:
            return await redis_examine.examine(connection.call, prefix=self._prefix)
        finally:
            await connection.close()


class _RedisLease:
    """A lease as a key that expires, on a blocking connection of its own. Never retries: the next renewal will."""

    def __init__(self, address: Address, key: str) -> None:
        self._address = address
        self._key = key
        self._client: redis.Redis | None = None

    def renew(self, seconds: float) -> None:
        try:
            self._connected().set(self._key, "1", px=_milliseconds(seconds))
        except (redis.RedisError, OSError) as error:
            self._unreachable(error)

    def close(self, *, release: bool) -> None:
        try:
            if release:
                self._connected().delete(self._key)
        except (redis.RedisError, OSError):
            pass
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _unreachable(self, error: Exception) -> NoReturn:
        raise StoreUnavailable(f"the lease at {self._address.url} was not renewed: {type(error).__name__}") from None

    def _connected(self) -> redis.Redis:
        if self._client is None:
            address = self._address
            where: dict[str, Any] = {"unix_socket_path": address.path} if address.path else {}
            if address.tls is not None:
                where |= {"ssl": True, "ssl_check_hostname": True, **address.tls_options}
            self._client = redis.Redis(
                host=address.host,
                port=address.port,
                db=address.db,
                username=address.username or None,
                password=address.password or None,
                socket_timeout=LEASE_SECONDS,
                socket_connect_timeout=LEASE_SECONDS,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
                **where,
            )
        return self._client


# ---- between Python and the scripts


def _milliseconds(seconds: float) -> int:
    return max(1, math.ceil(seconds * 1000))


def _flat(pairs: Mapping[str, Any]) -> list[Arg]:
    return [part for pair in pairs.items() for part in pair]


def _split(fields: Mapping[str, bytes | None]) -> tuple[dict[str, bytes], list[str]]:
    """Those with a value, and the names of those with None."""
    values = {name: value for name, value in fields.items() if value is not None}
    return values, [name for name, value in fields.items() if value is None]


def _optional(name: str | None) -> str:
    return "" if name is None else "=" + name


def _position(entry: bytes) -> int:
    return int(entry[2:])


def _loaded(now: int, pairs: list[bytes]) -> Loaded:
    """The record as shared.lua describes it. What a newer version may have added is passed over (P12)."""
    fields: dict[str, bytes] = {}
    head = Cursor(0)
    cancels: list[str] = []
    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        if name[:1] == b"f":
            fields[name[1:].decode()] = value
        elif name == b"#h":
            position, _, _, tag = value.split(b" ", 3)
            head = Cursor(int(position), tag)
        elif name[:2] == b"#c" and int(value) > now:
            cancels.append(name[2:].decode())
    return Loaded(fields, head, frozenset(cancels))


def _decode_wake(message: bytes) -> list[Event] | None:
    """The events that append.lua put into its message, or None: something happened, read."""
    header, found, body = message.partition(b"\n")
    numbers = header.split()
    if not found or numbers[0] != b"1":
        return None
    position, stream = int(numbers[1]), int(numbers[2])
    events: list[Event] = []
    at = 0
    for tag_size, data_size in zip(map(int, numbers[3::2]), map(int, numbers[4::2]), strict=True):
        middle = at + tag_size
        end = middle + data_size
        events.append(Event(position, body[at:middle], stream, body[middle:end]))
        position, at = position + 1, end
    return events
