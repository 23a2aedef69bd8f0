"""Sessions in Redis or Valkey (6.2 or newer; one server, a Cluster, or Sentinels): every method is one round trip.

Each is one script, and a script runs alone and whole on the server: that is where the protocol's atomicity comes from.
shared.lua describes the three keys of a session. Their names carry the session's key in braces, so that a Cluster keeps
them together:

    prefix:{key}:r    the record            prefix:n:<node>     a node's lease
    prefix:{key}:w    the append's books    prefix:g:<group>    sorted set of a group's sessions, by expiry
    prefix:{key}:l    the log               prefix:{key}:c<db>  pub/sub channel (which has no database of its own)
    prefix:mark       the mark of the data's history, on a Cluster several prefix:mark:<n>: see proof.py

An append publishes its events to the session's channel, whole where they are small. The server has to keep
`maxmemory-policy noeviction`: others drop one key of a session and not the rest. A log that is not what its record
says is reported as `Diverged`, never read as empty (P9).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from nonstick.errors import (
    AlreadyExists,
    ConfigurationError,
    SessionNotFound,
    StoreUnavailable,
    TooManySessions,
    Trimmed,
)
from nonstick.store import (
    EMPTY_GRACE_SECONDS,
    FRESH_SHARE,
    MAX_CLIP,
    MAX_READ_BYTES,
    NEW_STREAM,
    Appended,
    Batch,
    Cursor,
    Event,
    Lease,
    Loaded,
    News,
    Skimmed,
    Wake,
)
from nonstick.stores.common.bounds import NOT_OPENED, check_bounds, check_places
from nonstick.stores.common.options import checked_grace
from nonstick.stores.common.upkeep import Finding
from nonstick.stores.redis import scripts
from nonstick.stores.redis.checkup import examine_all
from nonstick.stores.redis.groups import Groups
from nonstick.stores.redis.lease import lease_key, lease_on
from nonstick.stores.redis.messages import (
    batch_arguments,
    ends_at,
    flat,
    groups_in,
    loaded_from,
    milliseconds,
    news_in,
    position_of,
    split,
)
from nonstick.stores.redis.proof import Proof
from nonstick.stores.redis.pubsub import Subscriber
from nonstick.stores.redis.scripts import Scripts
from nonstick.stores.redis.sentinel import LastFailover
from nonstick.stores.redis.servers import Limits, Servers, write_anywhere
from nonstick.stores.redis.sockets import Arg
from nonstick.stores.redis.topology import servers_of
from nonstick.stores.redis.url import Deployment, Durability

__all__ = ["RedisStore"]

SKIMMED_BYTES: Final = 4 * MAX_READ_BYTES
"""About how many bytes of a log one `skim` looks at. The server has to fetch events whole, but sends less of them."""

_TOUCHES: Final = 256


class _Opened(NamedTuple):
    """What a store has from being entered to being left.

    Attributes:
        groups: On a Cluster a session's groups have slots of their own, so that no script can write to both. None on
            one server, where the scripts keep them.
    """

    servers: Servers
    proof: Proof
    scripts: Scripts
    subscriber: Subscriber[News]
    groups: Groups | None


class RedisStore:
    """The store protocol over one Redis or Valkey server, a Cluster of them, or the primary that Sentinels name.

    Args:
        url: `redis://[[user]:password@]host[:port][/db]`, `rediss://` likewise with TLS (with `ssl_ca_certs` and the
            like as query parameters), or `unix:///path/to.sock[?db=1]`: the forms of redis-py. Or
            `redis+cluster://host[:port][,host[:port]...]`, or `redis+sentinel://host[:port][,...]/service[/db]`, the
            hosts being Sentinels, which may have a login of their own (`?sentinel_username=`, `?sentinel_password=`).
        prefix: Of all keys and channels. Deployments that share a server need different ones.
        durability: "replicated": creating a session, a server's request to the client, and the end of a stream count
            only once a replica has them too, and with them all that went before. While no replica keeps up these fail
            with StoreUnavailable, and repeating them is safe. Also as `?durability=replicated` in the URL.
        timeout: Seconds that any call waits for its answer, connecting included.
        connect_timeout: Seconds for connecting and logging in.
        max_waiting: Commands that may wait for their answers at once; beyond that calls fail immediately (P10).
        max_bytes: Bytes of these commands.
        heartbeat: Seconds between two proofs of life on the subscription; its silent death is noticed within two.
        empty_grace: Seconds for which a server that has lost its data is not believed when it says that a session is
            gone: somebody may bring the data back (P15). Also as `?empty_grace=15` in the URL.

    Raises:
        ConfigurationError: The URL, the prefix or `empty_grace` cannot work.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "nonstick",
        durability: Durability | None = None,
        timeout: float = 2.0,
        connect_timeout: float = 2.0,
        max_waiting: int = 10_000,
        max_bytes: int = 64 * 1024 * 1024,
        heartbeat: float = 3.0,
        empty_grace: float | None = None,
    ) -> None:
        if empty_grace is not None:
            checked_grace(empty_grace)
        if not prefix or not prefix.isascii() or not prefix.isprintable() or set(prefix) & set("{} "):
            raise ConfigurationError("the store's prefix must be visible ASCII without braces")
        self._deployment = Deployment.parse(url)
        self._replicated = (durability or self._deployment.durability) == "replicated"
        self._prefix = prefix
        self._limits = Limits(
            name=prefix,
            timeout=timeout,
            connect_timeout=connect_timeout,
            max_waiting=max_waiting,
            max_bytes=max_bytes,
        )
        self._heartbeat = heartbeat
        self._empty_grace = _first_given(empty_grace, self._deployment.empty_grace, EMPTY_GRACE_SECONDS)
        self._last_failover = LastFailover()
        # The scripts put this before the names of groups. Empty: they keep no groups.
        self._indexed_by_scripts = "" if self._deployment.kind == "cluster" else prefix
        self._entered: _Opened | None = None

    def __repr__(self) -> str:
        return f"RedisStore({self.url!r}, prefix={self._prefix!r})"

    @property
    def namespace(self) -> str:
        """What sets this deployment's keys apart on the server."""
        return self._prefix

    @property
    def url(self) -> str:
        """Where it is, without any credentials: fit for logs."""
        return self._deployment.url

    async def __aenter__(self) -> Self:
        if self._entered is not None:
            raise RuntimeError("a store is entered once")
        on_cluster = self._deployment.kind == "cluster"
        servers = servers_of(self._deployment, self._limits, last=self._last_failover)
        proof = Proof(servers, stem=f"{self._prefix}:mark", url=self.url, grace=self._empty_grace)
        run = Scripts(
            servers,
            proof,
            prefix=self._prefix,
            timeout=self._limits.timeout,
            replicated=self._replicated,
            on_cluster=on_cluster,
        )
        subscriber = self._subscriber_on(servers)
        servers.on_switch = subscriber.reopen
        groups = None
        if on_cluster:
            seconds = self._limits.timeout / 4
            groups = Groups(self._prefix, run=run.run_for_group, call=servers.call, seconds=seconds)
        self._entered = _Opened(servers, proof, run, subscriber, groups)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        opened = self._opened
        await opened.subscriber.close()
        await opened.proof.close()
        await opened.servers.close()

    @property
    def _opened(self) -> _Opened:
        if self._entered is None:
            raise RuntimeError("the store is not open: use `async with RedisStore(...) as store`")
        return self._entered

    @property
    def _scripts(self) -> Scripts:
        return self._opened.scripts

    @property
    def _groups(self) -> Groups | None:
        return self._opened.groups

    def _subscriber_on(self, servers: Servers) -> Subscriber[News]:
        async def publish(channel: str) -> None:
            # The key decides by way of which of a Cluster's servers: any will do, and not always the same one.
            await servers.call(secrets.token_hex(4), "PUBLISH", channel, "")

        return Subscriber[News](
            self._deployment.address,
            name=self._prefix,
            prefix=self._prefix,
            decode=news_in,
            publish=publish,
            open=servers.open_subscription,
            interval=self._heartbeat,
        )

    def _channel(self, key: str) -> str:
        return f"{self._prefix}:{{{key}}}:c{self._deployment.address.db}"

    # ---- the record

    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        groups = limits or {}
        if self._groups is not None and (full := await self._groups.admit(key, groups, lifetime)) is not None:
            name = f"{self._prefix}:{{{key}}}:r"
            if await self._opened.servers.call(name, "EXISTS", name):
                raise AlreadyExists
            raise TooManySessions(full)
        reply = await self._scripts.run(
            scripts.CREATE,
            key,
            self._indexed_by_scripts,
            key,
            milliseconds(lifetime),
            len(groups),
            *flat(groups),
            *flat(fields),
            replicated=True,
            says_no=scripts.is_list,
        )
        if type(reply) is list:
            raise TooManySessions(reply[1].decode())
        if self._groups is not None:
            await self._groups.renew(key, groups, milliseconds(lifetime))

    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        opened = self._entered or self._opened
        share = FRESH_SHARE if renew else 1
        now, pairs, renewed = await opened.scripts.run(scripts.LOAD, key, self._indexed_by_scripts, key, share)
        if renewed and opened.groups is not None:
            groups = dict(zip(pairs[::2], pairs[1::2], strict=True)).get(b"#g", b"")
            await opened.groups.renew(key, groups_in(groups), renewed)
        return loaded_from(now, pairs)

    async def update(
        self,
        key: str,
        changes: Mapping[str, bytes | None],
        *,
        expect: Mapping[str, bytes | None] | None = None,
        lifetime: float | None = None,
    ) -> bool:
        has, lacks = split(expect or {})
        sets, removes = split(changes)
        written = await self._scripts.run(
            scripts.UPDATE,
            key,
            self._indexed_by_scripts,
            key,
            0 if lifetime is None else milliseconds(lifetime),
            len(has),
            len(lacks),
            len(sets),
            len(removes),
            *flat(has),
            *lacks,
            *flat(sets),
            *removes,
            says_no=scripts.is_zero,
        )
        if written and lifetime is not None and self._groups is not None:
            try:
                await self._touch(key)
            except StoreUnavailable:
                pass  # only the groups' counts lag behind
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
            lifetime, groups = await self._scripts.run(scripts.TOUCH, key, self._indexed_by_scripts, key)
        except SessionNotFound:
            return
        if self._groups is not None:
            await self._groups.renew(key, groups_in(groups), lifetime)

    async def delete(self, key: str) -> bool:
        ended, groups = False, b""

        def says_no(reply: Any) -> bool:
            # Always: whatever was there, it says that nothing is there now. Asked again, it tells no groups any more.
            nonlocal ended, groups
            ended, groups = ended or bool(reply[0]), groups or reply[1]
            return True

        args = (self._indexed_by_scripts, key, self._channel(key))
        await self._scripts.run(scripts.DELETE, key, *args, says_no=says_no)
        if self._groups is not None:
            await self._groups.leave(key, groups_in(groups))
        return ended

    # ---- the log

    async def append(self, key: str, batch: Batch) -> Appended:
        if batch.stream == NEW_STREAM and not batch.events:
            raise ValueError(NOT_OPENED)
        matters = batch.terminal or bool(batch.expect)
        args = (self._channel(key), *batch_arguments(batch))
        first, duplicate, size, count = await (self._entered or self._opened).scripts.run(
            scripts.APPEND, key, *args, replicated=matters
        )
        return Appended(first, bool(duplicate), size, count)

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        check_bounds(limit=limit, max_bytes=max_bytes)
        entries = await self._entries(key, after, limit, max_bytes)
        return [_event(name, pairs) for name, pairs in entries]

    async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
        check_bounds(limit=limit, clip=clip)
        entries = await self._entries(key, after, limit, SKIMMED_BYTES, clip)
        return [
            Skimmed(Event(position_of(name), pairs[1], int(pairs[3]), pairs[5]), pairs[7]) for name, pairs in entries
        ]

    async def _entries(self, key: str, after: Cursor, limit: int, max_bytes: int, *clip: int) -> list[Any]:
        """The log's entries after the cursor, as read.lua answers them."""
        args: tuple[Arg, ...] = (after.position, after.tag, limit, max_bytes, *clip)
        entries: list[Any] = await self._scripts.run(scripts.READ, key, *args, says_no=scripts.is_trimmed)
        if entries and entries[0] == b"trimmed":
            raise Trimmed(position_of(entries[1]))
        return entries

    async def trim(self, key: str, *, streams: Collection[int] = (), standalone_before: int = 0) -> None:
        try:
            await self._scripts.run(scripts.TRIM, key, standalone_before, *streams)
        except SessionNotFound:
            pass

    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        """See `nonstick.store.TellsStale`. Plain commands: no script may be about sessions in several slots."""
        check_places(places)
        commands: list[tuple[Arg, ...]] = []
        for key in places:
            stem = f"{self._prefix}:{{{key}}}:"
            commands += (("HMGET", stem + "r", "#x", "#h", "#b"), ("EXISTS", stem + "w"))
        if not commands:
            return set()
        replies = await self._opened.servers.call_each(commands)
        if all(isinstance(reply, StoreUnavailable) for reply in replies):
            raise replies[0]
        told = zip(places.items(), replies[::2], replies[1::2], strict=True)
        return {key for (key, place), record, books in told if not ends_at(place, record, books)}

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        return self._opened.subscriber.watch(self._channel(key), wake)

    # ---- nodes and the store itself

    def lease(self, node: str) -> Lease:
        return lease_on(self._deployment, prefix=self._prefix, node=node, last=self._last_failover)

    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        # One GET each, sent together: on a Cluster their keys lie on several servers.
        names = list(nodes)
        leases = (self._scripts.value_of(lease_key(self._prefix, name)) for name in names)
        values = await asyncio.gather(*leases, return_exceptions=True)
        for value in values:
            if isinstance(value, BaseException):
                raise value
        return {name for name, value in zip(names, values, strict=True) if value is None}

    async def ping(self) -> None:
        # A write: a replica, a full memory or a disk that is gone would answer PING as if all were well.
        await write_anywhere(self._opened.servers, f"{self._prefix}:ping")

    async def examine(self) -> list[Finding]:
        """See `nonstick.stores.common.upkeep.Examinable`."""
        return await examine_all(self._deployment, self._limits, prefix=self._prefix)


def _event(name: bytes, pairs: list[Any]) -> Event:
    """One entry as read.lua answers it: its name, and its values each after what it is."""
    return Event(position_of(name), pairs[1], int(pairs[3]), pairs[5])


def _first_given(*values: float | None) -> float:
    return next(value for value in values if value is not None)
