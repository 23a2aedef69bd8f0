"""Sessions in Redis or Valkey (6.2 or newer; one server, a Cluster, or Sentinels): every method is one round trip.

Each is one script, and a script runs alone and whole on the server: that is where the protocol's atomicity comes from.
shared.lua describes the three keys of a session. Their names carry the session's key in braces, so that a Cluster keeps
them together:

    prefix:{key}:r    the record            prefix:n:<node>     a node's lease
    prefix:{key}:w    the append's books    prefix:g:<group>    sorted set of a group's sessions, by expiry
    prefix:{key}:l    the log               prefix:{key}:c<db>  pub/sub channel (which has no database of its own)
    prefix:mark       the mark of the data's history, on a Cluster several prefix:mark:<n>: see redis_proof.py

An append publishes its events to the session's channel, whole where they are small. The server has to keep
`maxmemory-policy noeviction`: others drop one key of a session and not the rest. A log that is not what its record
says is reported as `Diverged`, never read as empty (P9).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from importlib import resources
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

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
from nonstick.store import (
    CANCEL_SECONDS,
    EMPTY_GRACE_SECONDS,
    FRESH_SHARE,
    MAX_CANCELS,
    MAX_CLIP,
    MAX_READ_BYTES,
    NEW_STREAM,
    WRITER_SECONDS,
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
from nonstick.stores.common.bounds import check_bounds
from nonstick.stores.common.options import checked_grace
from nonstick.stores.common.upkeep import Finding
from nonstick.stores.redis import examine as redis_examine
from nonstick.stores.redis.channels import check_channels
from nonstick.stores.redis.cluster import ClusterServers
from nonstick.stores.redis.connection import Arg, ScriptMissing
from nonstick.stores.redis.groups import Groups
from nonstick.stores.redis.proof import Proof
from nonstick.stores.redis.pubsub import Subscriber
from nonstick.stores.redis.sentinel import LastFailover, SentinelServers
from nonstick.stores.redis.servers import Answer, Limits, Servers, SingleServer
from nonstick.stores.redis.url import Deployment, Durability

__all__ = ["RedisStore"]

INLINE_BYTES: Final = 8 * 1024
"""Up to this many bytes of event data, an append's wake carries its events."""

SKIMMED_BYTES: Final = 4 * MAX_READ_BYTES
"""About so much of a log is looked at in one `skim`. The server has to fetch events whole, but sends less of them."""

LEASE_SECONDS: Final = 2.0
"""How long a renewal may take: a node that cannot renew has to find out well within its lease."""

RELEASE_SECONDS: Final = 0.5
"""How long a node that stops tries to end its lease, which also ends by itself."""

_TOUCHES: Final = 256


class _Script(NamedTuple):
    sha: str
    source: str


def _script(name: str) -> tuple[_Script, _Script]:
    """As it is on one server, and on a Cluster."""
    return _variant(name, "true"), _variant(name, "false")


def _variant(name: str, alone: str) -> _Script:
    folder = resources.files("nonstick.stores.redis") / "lua"
    constants = (
        f"local CANCEL_MS, WRITER_MS, INLINE_BYTES = {CANCEL_SECONDS * 1000}, {WRITER_SECONDS * 1000}, {INLINE_BYTES}\n"
        f"local MAX_CANCELS, ALONE = {MAX_CANCELS}, {alone}\n"
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
_GROUP: Final = _script("group")

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
        self._open: Servers | None = None
        self._proof: Proof | None = None
        self._subscriber: Subscriber[News] | None = None
        # On a Cluster a session's groups have slots of their own, so that no script can write to both.
        self._groups: Groups | None = None
        self._on_cluster = self._deployment.kind == "cluster"
        self._indexed_by_scripts = prefix
        if self._on_cluster:
            self._groups = Groups(
                prefix,
                run=self._run_for_group,
                call=lambda key, *args: self._servers.call(key, *args),
                seconds=timeout / 4,
            )
            self._indexed_by_scripts = ""

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
        if self._open is not None:
            raise RuntimeError("a store is entered once")
        self._open = servers = _servers(self._deployment, self._limits, last=self._last_failover)
        self._proof = Proof(servers, stem=f"{self._prefix}:mark", url=self.url, grace=self._empty_grace)
        self._subscriber = Subscriber(
            self._deployment.address,
            name=self._prefix,
            prefix=self._prefix,
            decode=_decode_wake,
            publish=self._publish,
            open=servers.open_subscription,
            interval=self._heartbeat,
        )
        servers.on_switch = self._subscriber.reopen
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        assert self._subscriber is not None
        assert self._proof is not None
        await self._subscriber.close()
        await self._proof.close()
        await self._servers.close()

    @property
    def _servers(self) -> Servers:
        if self._open is None:
            raise RuntimeError("the store is not open: use `async with RedisStore(...) as store`")
        return self._open

    def _channel(self, key: str) -> str:
        return f"{self._prefix}:{{{key}}}:c{self._deployment.address.db}"

    async def _publish(self, channel: str) -> None:
        # The key decides by way of which of a Cluster's servers: any will do, and it should not always be the same.
        await self._servers.call(secrets.token_hex(4), "PUBLISH", channel, "")

    async def _run(
        self,
        script: tuple[_Script, _Script],
        key: str,
        *args: Arg,
        replicated: bool = False,
        says_no: Callable[[Any], bool] | None = None,
    ) -> Any:
        """The script's answer for this session.

        Args:
            says_no: Whether an answer that is no refusal says that something is not so, and has to be proven (P15).
        """
        stem = f"{self._prefix}:{{{key}}}:"
        names = (stem + "r", stem + "w", stem + "l")
        answer = await self._evaluate(script, names, args, replicated=replicated and self._replicated)
        reply = answer[0]
        if (
            (type(reply) is bytes and reply in _REFUSALS)
            or (type(reply) is list and reply and reply[0] == b"gone")
            or (says_no is not None and says_no(reply))
        ):
            reply = await self._believed(
                answer,
                names[0],
                lambda: self._evaluate(script, names, args, replicated=replicated and self._replicated),
                lambda reply: _refusal_in(reply) is not None or (says_no is not None and says_no(reply)),
            )
            if (refusal := _refusal_in(reply)) is not None:
                raise _REFUSALS[refusal](_MESSAGES[refusal])
        return reply

    async def _run_for_group(self, name: str, *args: Arg) -> Any:
        def ask() -> Awaitable[Answer]:
            return self._evaluate(_GROUP, (name,), args)

        return await self._believed(await ask(), name, ask, _is_zero)

    async def _believed(
        self,
        answer: Answer,
        key: str,
        again: Callable[[], Awaitable[Answer]],
        says_no: Callable[[Any], bool],
    ) -> Any:
        """The reply, once it comes from a server that can know, if it says no (P15).

        Raises:
            StoreUnavailable: Within the store's timeout none was found, or it is not believed yet.
        """
        assert self._proof is not None
        loop = asyncio.get_running_loop()
        limit, pause = loop.time() + self._limits.timeout, 0.0
        while says_no(reply := answer[0]):
            if _is_loss(reply):
                proven = await self._proof.of_loss(key, *answer[1:], mark=_mark_in(reply))
            else:
                proven = await self._proof.of_owner(key, *answer[1:])
            if proven:
                break
            if loop.time() >= limit:
                raise StoreUnavailable("the store's servers do not agree on which of them has the session: try again")
            await asyncio.sleep(pause)
            pause = min(2 * pause + 0.01, 0.2)
            answer = await again()
        return reply

    async def _evaluate(
        self,
        variants: tuple[_Script, _Script],
        keys: tuple[str, ...],
        args: tuple[Arg, ...],
        *,
        replicated: bool = False,
    ) -> Answer:
        """The script's answer. A script that the server does not know has not run: it is sent whole."""
        ask, tail, script = self._servers.ask, (len(keys), *keys, *args), variants[self._on_cluster]
        try:
            return await ask(keys[0], "EVALSHA", script.sha, *tail, replicated=replicated)
        except ScriptMissing:
            return await ask(keys[0], "EVAL", script.source, *tail, replicated=replicated)

    # ---- the record

    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        groups = limits or {}
        if self._groups is not None and (full := await self._groups.admit(key, groups, lifetime)) is not None:
            if await self._is_live(key):
                raise AlreadyExists(_MESSAGES[b"exists"])
            raise TooManySessions(full)
        reply = await self._run(
            _CREATE,
            key,
            self._indexed_by_scripts,
            key,
            _milliseconds(lifetime),
            len(groups),
            *_flat(groups),
            *_flat(fields),
            replicated=True,
            says_no=_is_list,
        )
        if type(reply) is list:
            raise TooManySessions(reply[1].decode())
        if self._groups is not None:
            await self._groups.renew(key, groups, _milliseconds(lifetime))

    async def _is_live(self, key: str) -> bool:
        name = f"{self._prefix}:{{{key}}}:r"
        return bool(await self._servers.call(name, "EXISTS", name))

    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        share = FRESH_SHARE if renew else 1
        now, pairs, renewed = await self._run(_LOAD, key, self._indexed_by_scripts, key, share)
        if renewed and self._groups is not None:
            groups = dict(zip(pairs[::2], pairs[1::2], strict=True)).get(b"#g", b"")
            await self._groups.renew(key, _lines(groups), renewed)
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
            self._indexed_by_scripts,
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
            says_no=_is_zero,
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
            lifetime, groups = await self._run(_TOUCH, key, self._indexed_by_scripts, key)
        except SessionNotFound:
            return
        if self._groups is not None:
            await self._groups.renew(key, _lines(groups), lifetime)

    async def delete(self, key: str) -> bool:
        ended = [False]

        def says_no(reply: Any) -> bool:
            # Always: whatever was there, it says that nothing is there now.
            ended.append(bool(reply[0]))
            return True

        args = (self._indexed_by_scripts, key, self._channel(key))
        _, groups, *_ = await self._run(_DELETE, key, *args, says_no=says_no)
        if self._groups is not None:
            await self._groups.leave(key, _lines(groups))
        return any(ended)

    # ---- the log

    async def append(self, key: str, batch: Batch) -> Appended:
        if batch.stream == NEW_STREAM and not batch.events:
            raise ValueError("a stream is opened by its first event")
        more = _more_of(batch)
        args: list[Arg] = [
            self._channel(key),
            batch.writer,
            batch.sequence,
            batch.stream,
            batch.attempt,
            ("t" if batch.take_over else "") + ("e" if batch.terminal else "") + ("x" if more else ""),
            *more,
        ]
        for event in batch.events:
            args += event
        matters = batch.terminal or bool(batch.expect)
        first, duplicate, size, count = await self._run(_APPEND, key, *args, replicated=matters)
        return Appended(first, bool(duplicate), size, count)

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        check_bounds(limit=limit, max_bytes=max_bytes)
        entries = await self._entries(key, after, limit, max_bytes)
        return [Event(_position(name), pairs[1], int(pairs[3]), pairs[5]) for name, pairs in entries]

    async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
        check_bounds(limit=limit, clip=clip)
        entries = await self._entries(key, after, limit, SKIMMED_BYTES, clip)
        return [Skimmed(Event(_position(name), pairs[1], int(pairs[3]), pairs[5]), pairs[7]) for name, pairs in entries]

    async def _entries(self, key: str, after: Cursor, limit: int, max_bytes: int, *clip: int) -> list[Any]:
        """The log's entries after the cursor, as read.lua answers them."""
        args: tuple[Arg, ...] = (after.position, after.tag, limit, max_bytes, *clip)
        entries: list[Any] = await self._run(_READ, key, *args, says_no=_is_trimmed)
        if entries and entries[0] == b"trimmed":
            raise Trimmed(_position(entries[1]))
        return entries

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
        return _RedisLease(self._deployment, self._prefix, self._lease_key(node), self._last_failover)

    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        # One GET each, sent together: on a Cluster their keys lie on several servers.
        names = list(nodes)
        values = await asyncio.gather(*map(self._lease_of, names), return_exceptions=True)
        for value in values:
            if isinstance(value, BaseException):
                raise value
        return {name for name, value in zip(names, values, strict=True) if value is None}

    async def _lease_of(self, node: str) -> bytes | None:
        name = self._lease_key(node)

        def ask() -> Awaitable[Answer]:
            return self._servers.ask(name, "GET", name)

        lease: bytes | None = await self._believed(await ask(), name, ask, _is_none)
        return lease

    async def ping(self) -> None:
        # A write: a replica, a full memory or a disk that is gone would answer PING as if all were well. Of a Cluster
        # one server is enough: should another be away, no node would be ready, though all can serve most sessions.
        servers = self._servers
        names = await servers.names_for_each(f"{self._prefix}:ping")
        tries = [asyncio.ensure_future(servers.call(name, "SET", name, "", "PX", 1000)) for name in names]
        waiting = set(tries)
        try:
            while True:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                failures = [failure for tried in done if (failure := tried.exception()) is not None]
                if len(failures) < len(done):
                    return
                if not waiting:
                    raise failures[0]
        finally:
            for tried in tries:
                tried.cancel()

    async def examine(self) -> list[Finding]:
        """See `nonstick.stores.common.upkeep.Examinable`."""
        servers = _servers(self._deployment, replace(self._limits, examine=False))
        try:
            return await _examine(servers, self._prefix, cluster=self._deployment.kind == "cluster")
        finally:
            await servers.close()


def _servers(
    deployment: Deployment, limits: Limits, *, listen: bool = True, last: LastFailover | None = None
) -> Servers:
    match deployment.kind:
        case "cluster":
            return ClusterServers(deployment, limits)
        case "sentinel":
            return SentinelServers(deployment, limits, listen=listen, last=last)
        case "server":
            return SingleServer(deployment.address, limits)


class _RedisLease:
    """A lease as a key that expires. Its connections belong to an event loop that runs only inside these calls."""

    def __init__(self, deployment: Deployment, prefix: str, key: str, last: LastFailover) -> None:
        self._deployment = deployment
        self._last = last
        self._limits = Limits(name=prefix, timeout=LEASE_SECONDS, connect_timeout=LEASE_SECONDS, examine=False)
        self._key = key
        self._runner = asyncio.Runner()
        self._open: Servers | None = None

    def renew(self, seconds: float) -> None:
        try:
            self._runner.run(self._set(LEASE_SECONDS, "SET", self._key, "1", "PX", _milliseconds(seconds)))
        except (StoreUnavailable, TimeoutError) as error:
            why = str(error) or "no answer in time"
            raise StoreUnavailable(f"the lease at {self._deployment.url} was not renewed: {why}") from None

    def close(self, *, release: bool) -> None:
        with self._runner:
            try:
                if release:
                    self._runner.run(self._set(RELEASE_SECONDS, "DEL", self._key))
            except (StoreUnavailable, TimeoutError):
                pass
            self._runner.run(self._disconnect())

    async def _set(self, patience: float, *command: Arg) -> None:
        async with asyncio.timeout(patience):
            try:
                await self._call(*command)
            except StoreUnavailable:
                # What was lost since the last renewal is only noticed now, and another server may have taken over.
                await self._call(*command)
        if self._deployment.kind == "sentinel":
            # Nobody listens for a failover between the renewals, so each begins with finding the primary.
            await self._disconnect()

    async def _call(self, *command: Arg) -> None:
        if self._open is None:
            self._open = _servers(self._deployment, self._limits, listen=False, last=self._last)
        await self._open.call(self._key, *command)

    async def _disconnect(self) -> None:
        servers, self._open = self._open, None
        if servers is not None:
            await servers.close()


async def _examine(servers: Servers, prefix: str, *, cluster: bool) -> list[Finding]:
    """What each server is and may do. On more than one, each text names its server."""
    findings: list[Finding] = []
    key = secrets.token_hex(20)
    for address, call in await servers.each():
        here = [*await redis_examine.check_server(call, cluster=cluster), await redis_examine.check_clock(call)]
        if not any(finding.blocks for finding in here):
            here.append(await check_channels(call, prefix=prefix, key=key))
        findings += [replace(one, text=f"{address.place}: {one.text}") for one in here] if cluster else here
    if any(finding.blocks for finding in findings):
        return findings

    async def routed(*command: Arg) -> Any:
        key = next((str(part) for part in command if str(part).startswith(f"{prefix}:")), "")
        return await servers.call(key, *command)

    return findings + await redis_examine.check_permissions(routed, prefix=prefix, key=key)


# ---- between Python and the scripts


def _is_zero(reply: Any) -> bool:
    return bool(reply == 0)


def _is_none(reply: Any) -> bool:
    return reply is None


def _is_list(reply: Any) -> bool:
    return type(reply) is list


def _is_trimmed(reply: Any) -> bool:
    return bool(reply and reply[0] == b"trimmed")


def _is_loss(reply: Any) -> bool:
    """Whether it says that something is gone, or was never there; and not only that it is not as it should be."""
    return reply is None or (type(reply) is list and reply[0] in (0, b"gone"))


def _refusal_in(reply: Any) -> bytes | None:
    if type(reply) is list and reply and reply[0] == b"gone":
        return b"gone"
    return reply if type(reply) is bytes and reply in _REFUSALS else None


def _mark_in(reply: Any) -> bytes | None:
    """The mark that goes along with the answer that something is gone, where there is one server."""
    return reply[-1] if reply is not None else None


def _first_given(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _milliseconds(seconds: float) -> int:
    return max(1, math.ceil(seconds * 1000))


def _flat(pairs: Mapping[str, Any]) -> list[Arg]:
    return [part for pair in pairs.items() for part in pair]


def _split(fields: Mapping[str, bytes | None]) -> tuple[dict[str, bytes], list[str]]:
    """Those with a value, and the names of those with None."""
    values = {name: value for name, value in fields.items() if value is not None}
    return values, [name for name, value in fields.items() if value is None]


def _lines(groups: bytes) -> list[str]:
    return groups.decode().split("\n") if groups else []


def _optional(name: str | None) -> str:
    return "" if name is None else "=" + name


def _more_of(batch: Batch) -> list[Arg]:
    """The parts that few batches have, as append.lua takes them; empty without any."""
    names = (batch.answers, batch.settle, batch.cancel, batch.uncancel)
    if names == (None, None, None, None) and not batch.expect and not batch.fields:
        return []
    sets, removes = _split(batch.fields)
    return [*map(_optional, names), len(batch.expect), len(sets), len(removes), *batch.expect, *_flat(sets), *removes]


def _position(entry: bytes) -> int:
    return int(entry[2:])


def _loaded(now: int, pairs: list[bytes]) -> Loaded:
    """The record as shared.lua describes it. What a newer version may have added is passed over (P12)."""
    fields: dict[str, bytes] = {}
    head, size, count = Cursor(0), 0, 0
    cancels: list[str] = []
    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        if name[:1] == b"f":
            fields[name[1:].decode()] = value
        elif name == b"#h":
            position, *books, tag = value.split(b" ", 3)
            head = Cursor(int(position), tag)
            size, count = map(int, books)
        elif name[:2] == b"#c" and int(value) > now:
            cancels.append(name[2:].decode())
    return Loaded(fields, head, frozenset(cancels), size, count)


def _decode_wake(message: bytes) -> News | None:
    """What append.lua put into its message, or None: something happened, read."""
    header, found, body = message.partition(b"\n")
    numbers = header.split()
    if not found or numbers[0] != b"2":
        return None
    try:
        first, stream, at, *sizes = map(int, numbers[1:])
        events = _events(first, stream, sizes, body[at:])
    except ValueError:
        return None  # append.lua has not written this
    return News(Cursor(first - 1, body[:at]), events)


def _events(first: int, stream: int, sizes: list[int], body: bytes) -> list[Event]:
    events: list[Event] = []
    at = 0
    for tag_size, data_size in zip(sizes[::2], sizes[1::2], strict=True):
        middle = at + tag_size
        end = middle + data_size
        events.append(Event(first + len(events), body[at:middle], stream, body[middle:end]))
        at = end
    return events
