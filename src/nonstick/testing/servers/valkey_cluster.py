"""A real Valkey Cluster as child processes, for tests: primaries, replicas, and the verbs that shake it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import redis

from nonstick.testing.servers.valkey import START_SECONDS, ReservedPort, ValkeyServer

__all__ = ["ValkeyCluster", "ValkeyNode", "ask", "until"]

SLOTS: Final = 16384

# As quick as a test wants it: replicas follow at once. One that never had the data is not elected: that takes a factor
# other than 0.
_OPTIONS: Final = (
    *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"),
    *("--cluster-replica-validity-factor", "30", "--cluster-allow-replica-migration", "no"),
    *("--repl-diskless-sync-delay", "0"),
)


def ask(server: ValkeyServer, *command: str | int | bytes) -> Any:
    """The server's answer to an administrator's command, on a connection of its own; text as `str`.

    Raises:
        redis.RedisError: It refused, could not be reached, or did not answer in time.
    """
    with redis.Redis(
        port=server.port, protocol=2, decode_responses=True, socket_timeout=START_SECONDS, socket_connect_timeout=5
    ) as client:
        return client.execute_command(*command)


def until(condition: Callable[[], bool], what: str, *, seconds: float = 120.0) -> None:
    """Blocks until it holds; a server that does not answer counts as not yet.

    Raises:
        RuntimeError: It did not within `seconds`.
    """
    limit = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except redis.RedisError:
            pass
        if time.monotonic() > limit:
            raise RuntimeError(f"after {seconds:g} s not yet: {what}")
        time.sleep(0.01)


class ValkeyNode(ValkeyServer):
    """One server of a cluster: as `ValkeyServer`, but without its data it is still the same member of the cluster."""

    def __init__(self, *options: str) -> None:
        self._bus = ReservedPort()
        super().__init__("--cluster-port", str(self._bus.port), *_OPTIONS, *options)

    @property
    def id(self) -> str:
        """Its name in the cluster."""
        return str(ask(self, "CLUSTER", "MYID"))

    def _data(self) -> list[Path]:
        return [path for path in super()._data() if path.name != "nodes.conf"]


class ValkeyCluster:
    """A Valkey Cluster on free loopback ports: `primaries` of them, each with so many `replicas`.

    A context manager; it blocks, for a second or two, to start. Its servers die with this process. Single servers are
    killed, frozen, thawed and started again by their own verbs: `cluster.primary("key").kill()`. All verbs block:
    call them by `asyncio.to_thread` where an event loop has to go on.

    Args:
        options: Further arguments of every server.
        node_timeout: Seconds after which an unreachable node counts as failed, and a replica takes over.
        spares: Further members, which have no slots yet: primaries that were added later.
    """

    def __init__(
        self, *options: str, primaries: int = 3, replicas: int = 0, node_timeout: float = 1.0, spares: int = 0
    ) -> None:
        timeout = ("--cluster-node-timeout", str(int(node_timeout * 1000)))
        self._shape = (primaries, replicas)
        self.nodes = [ValkeyNode(*timeout, *options) for _ in range(primaries * (1 + replicas) + spares)]
        """Every server, first those that began as primaries, last those that have no slots."""
        self._stack = ExitStack()
        self._clean = weakref.finalize(self, self._stack.close)

    def __enter__(self) -> Self:
        try:
            for node in self.nodes:
                self._stack.enter_context(node)
            self._join()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._clean()

    @property
    def url(self) -> str:
        """For a `RedisStore`: all servers are named, so that it is found while any of them answers."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    # ---- members

    def slot(self, key: str) -> int:
        """The hash slot of this key; of a session's keys `{session key}` is enough."""
        return int(ask(self._alive(), "CLUSTER", "KEYSLOT", key))

    def primary(self, key: str | int) -> ValkeyNode:
        """The server that the reachable ones hold for the owner of this key (or slot number), living or not."""
        slot = key if isinstance(key, int) else self.slot(key)
        return self._at(self._owner_port(self._alive(), slot))

    def replicas(self, primary: ValkeyServer) -> list[ValkeyNode]:
        """The servers that follow this one."""
        return [self._at(port) for port, owner in self._followers(self._alive()) if owner == primary.port]

    # ---- verbs

    def wait_until_ok(self) -> None:
        """Returns once every running server sees every slot served, and every running replica follows its primary."""
        running = [node for node in self.nodes if node.running]
        until(lambda: all(self._is_ok(node) for node in running), "the cluster's state is ok")

    def wait_until_whole(self) -> None:
        """Returns once a primary can be lost again: all servers run, and agree on owners and followers.

        Each follower has everything that its primary had when this was called.
        """
        heads = {node.port: ask(node, "ROLE")[1] for node in self.nodes if ask(node, "ROLE")[0] == "master"}
        until(lambda: self._is_whole(heads), "the cluster is whole", seconds=60.0)

    def failover(self, key: str | int) -> ValkeyNode:
        """A replica takes over from the primary of this key, by arrangement: nothing is lost. Returns the new primary.

        Every running server knows when this returns.
        """
        old = self.primary(key)
        ask(self.replicas(old)[0], "CLUSTER", "FAILOVER")
        return self.wait_for_successor(key, old)

    def wait_for_successor(self, key: str | int, old: ValkeyServer) -> ValkeyNode:
        """Returns the new primary of this key, once every running server but the old one knows it."""
        slot = key if isinstance(key, int) else self.slot(key)
        others = [node for node in self.nodes if node is not old and node.running]

        def agreed() -> bool:
            ports = {self._owner_port(node, slot) for node in others}
            return len(ports) == 1 and ports != {old.port} and all(self._is_ok(node) for node in others)

        until(agreed, "a replica took over")
        return self.primary(slot)

    def begin_migration(self, slot: int, to: ValkeyNode) -> None:
        """From now on the slot's owner answers ASK for keys that it does not have: they may be at `to` by now."""
        source = self.primary(slot)
        ask(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", to.id)

    def move_keys(self, slot: int, to: ValkeyNode, *keys: str, login: Sequence[str] = ()) -> int:
        """Moves these keys of the slot, or all of them, to where it is being migrated; returns how many."""
        source, moved = self.primary(slot), 0
        while names := list(keys) or ask(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            answer = ask(source, "MIGRATE", "127.0.0.1", to.port, "", 0, 5000, *login, "KEYS", *names)
            moved += len(names) if answer == "OK" else 0
            if keys:
                break
        return moved

    def end_migration(self, slot: int, to: ValkeyNode) -> None:
        """Moves what is left in the slot, of anybody. Then the slot is `to`'s; every primary is told."""
        self.move_keys(slot, to)
        source, name = self.primary(slot), to.id
        for node in (to, source, *(node for node in self._primaries() if node not in (to, source))):
            ask(node, "CLUSTER", "SETSLOT", slot, "NODE", name)

    def migrate_slot(self, slot: int, to: ValkeyNode) -> None:
        """Moves the slot, key by key, as resharding tools do."""
        self.begin_migration(slot, to)
        self.end_migration(slot, to)

    def migrate_slot_whole(self, slot: int, to: ValkeyNode) -> None:
        """Moves the slot in one step, as Valkey 9 can: clients see no ASK and no TRYAGAIN, only MOVED.

        Every running server knows when this returns.
        """
        ask(self.primary(slot), "CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", to.id)
        others = [node for node in self.nodes if node.running and not node.frozen]
        until(lambda: {self._owner_port(node, slot) for node in others} == {to.port}, "the slot is migrated")

    # ---- how it is made

    def _join(self) -> None:
        primaries, replicas = self._shape
        owners = self.nodes[:primaries]
        for i, node in enumerate(owners):
            first, last = i * SLOTS // primaries, (i + 1) * SLOTS // primaries - 1
            ask(node, "CLUSTER", "ADDSLOTSRANGE", first, last)
            ask(node, "CLUSTER", "SET-CONFIG-EPOCH", i + 1)
        for node in self.nodes:
            for other in self.nodes:
                # Everybody meets everybody: gossip alone would take seconds.
                if other is not node:
                    ask(node, "CLUSTER", "MEET", "127.0.0.1", other.port, other._bus.port)
        names = {node.id for node in self.nodes}
        until(lambda: all(self._known(node) == names for node in self.nodes), "all servers know each other")
        for i, node in enumerate(self.nodes[primaries : primaries * (1 + replicas)]):
            ask(node, "CLUSTER", "REPLICATE", owners[i // replicas].id)
        self.wait_until_ok()

    def _is_ok(self, node: ValkeyNode) -> bool:
        if "cluster_state:ok" not in ask(node, "CLUSTER", "INFO"):
            return False
        role = ask(node, "ROLE")
        return bool(role[0] == "master" or role[3] == "connected")

    def _is_whole(self, heads: dict[int, int]) -> bool:
        owners = {tuple(self._owner_ports(node)) for node in self.nodes}
        followers = {frozenset(self._followers(node)) for node in self.nodes}
        if len(owners) != 1 or len(followers) != 1 or not all(self._is_ok(node) for node in self.nodes):
            return False
        (ports,) = owners
        for node in self.nodes:
            role = ask(node, "ROLE")
            if (role[0] == "master") != (node.port in ports):
                return False
            if role[0] != "master" and role[4] < heads.get(role[2], 0):
                return False
        return True

    def _owner_ports(self, node: ValkeyNode) -> list[int]:
        return sorted({int(owner[1]) for _, _, owner, *_ in ask(node, "CLUSTER", "SLOTS")})

    def _alive(self) -> ValkeyNode:
        """One that answers; not a frozen one."""
        for node in self.nodes:
            if node.running and not node.frozen:
                return node
        raise RuntimeError("no server of the cluster is running")

    def _primaries(self) -> list[ValkeyNode]:
        return [node for node in self.nodes if node.running and not node.frozen and ask(node, "ROLE")[0] == "master"]

    def _at(self, port: int) -> ValkeyNode:
        return next(node for node in self.nodes if node.port == port)

    def _table(self, node: ValkeyNode) -> list[list[str]]:
        """CLUSTER NODES as this one sees it, without those that it is still shaking hands with."""
        lines = [line.split(" ") for line in ask(node, "CLUSTER", "NODES").splitlines()]
        return [line for line in lines if "handshake" not in line[2]]

    def _known(self, node: ValkeyNode) -> set[str]:
        return {line[0] for line in self._table(node)}

    def _followers(self, node: ValkeyNode) -> list[tuple[int, int]]:
        """(port of the replica, port of its primary) each."""
        table = self._table(node)
        ports = {line[0]: _port(line[1]) for line in table}
        return [(ports[line[0]], ports[line[3]]) for line in table if line[3] in ports]

    def _owner_port(self, node: ValkeyNode, slot: int) -> int:
        for first, last, owner, *_ in ask(node, "CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return int(owner[1])
        raise RuntimeError(f"nobody owns slot {slot}")


def _port(address: str) -> int:
    """Of "127.0.0.1:7000@17000,host"."""
    return int(address.partition("@")[0].rpartition(":")[2])
