"""A real Valkey primary with replicas, watched by real Sentinels, as child processes for tests."""

from __future__ import annotations

import secrets
import weakref
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from nonstick.testing.servers.valkey import ValkeyServer
from nonstick.testing.servers.valkey_cluster import ask, until

__all__ = ["ValkeySentinel"]

SERVICE: Final = "nonstick"
"""The name that the sentinels know the primary by."""


class _Watcher(ValkeyServer):
    """One Sentinel. It keeps what it learns in its configuration, also when its data is thrown away."""

    def __init__(self, *options: str) -> None:
        super().__init__(*options)
        self.id = secrets.token_hex(20)

    def configure(self, *lines: str) -> None:
        home = [f"port {self.port}", "bind 127.0.0.1", f'dir "{self._home}"', f"sentinel myid {self.id}"]
        self._configuration.write_text("\n".join([*home, *lines, ""]))

    @property
    def _configuration(self) -> Path:
        return self._home / "sentinel.conf"

    def _arguments(self) -> list[str]:
        return [str(self._configuration), "--sentinel", *self._options]

    def _data(self) -> list[Path]:
        return [path for path in super()._data() if path != self._configuration]


class ValkeySentinel:
    """A primary, its replicas, and Sentinels that watch them, on free loopback ports.

    A context manager; it blocks, for about a second, to start. Its servers die with this process. Each is killed,
    frozen, thawed and started again by its own verbs: `sentinel.primary.freeze()`. All verbs block: call them by
    `asyncio.to_thread` where an event loop has to go on.

    Args:
        options: Further arguments of the primary and its replicas.
        down_after: Seconds after which the primary, if it does not answer, counts as failed.
    """

    def __init__(self, *options: str, replicas: int = 1, sentinels: int = 3, down_after: float = 1.0) -> None:
        self.servers = [ValkeyServer("--repl-diskless-sync-delay", "0", *options) for _ in range(1 + replicas)]
        """The primary that it began with, and the replicas."""
        self.sentinels: list[ValkeyServer] = []
        self._watchers = [_Watcher() for _ in range(sentinels)]
        self.sentinels += self._watchers
        self._down_after = down_after
        self._stack = ExitStack()
        self._clean = weakref.finalize(self, self._stack.close)

    def __enter__(self) -> Self:
        try:
            for server in self.servers:
                self._stack.enter_context(server)
            first, *others = self.servers
            for replica in others:
                ask(replica, "REPLICAOF", "127.0.0.1", first.port)
            for watcher in self._watchers:
                watcher.configure(*self._configuration(watcher))
                self._stack.enter_context(watcher)
            self.wait_until_ok()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._clean()

    def _configuration(self, watcher: _Watcher) -> list[str]:
        """What a Sentinel would find out by itself, in some seconds."""
        first, *replicas = self.servers
        others = [other for other in self._watchers if other is not watcher]
        return [
            f"sentinel monitor {SERVICE} 127.0.0.1 {first.port} {len(self._watchers) // 2 + 1}",
            f"sentinel down-after-milliseconds {SERVICE} {int(self._down_after * 1000)}",
            f"sentinel failover-timeout {SERVICE} 3000",
            *(f"sentinel known-replica {SERVICE} 127.0.0.1 {replica.port}" for replica in replicas),
            *(f"sentinel known-sentinel {SERVICE} 127.0.0.1 {other.port} {other.id}" for other in others),
        ]

    @property
    def url(self) -> str:
        """For a `RedisStore`."""
        places = ",".join(f"127.0.0.1:{watcher.port}" for watcher in self._watchers)
        return f"redis+sentinel://{places}/{SERVICE}/0"

    @property
    def primary(self) -> ValkeyServer:
        """The server that most Sentinels name, living or not."""
        named = [self._named(watcher) for watcher in self._running()]
        return next(server for server in self.servers if server.port == max(named, key=named.count))

    @property
    def replicas(self) -> list[ValkeyServer]:
        """The other servers."""
        primary = self.primary
        return [server for server in self.servers if server is not primary]

    def wait_until_ok(self) -> None:
        """Returns once every running server follows the primary and every running Sentinel knows the others."""

        def ok() -> bool:
            primary, known = self.primary, len(self.sentinels) - 1
            running = [server for server in self.servers if server.running and not server.frozen]
            return (
                ask(primary, "ROLE")[0] == "master"
                and all(_follows(server, primary) for server in running if server is not primary)
                and all(_known_sentinels(one) == known for one in self._running())
            )

        until(ok, "the servers follow their primary")

    def wait_until_whole(self) -> None:
        """Returns once the primary can be lost again: all Sentinels name it and miss nobody, and replicas have all.

        "All" is what the primary had when this was called, or when it took over meanwhile: on a busy machine the
        Sentinels may replace one that nobody harmed.
        """
        self.wait_until_ok()
        primary = self.primary
        head = ask(primary, "ROLE")[1]

        def whole() -> bool:
            nonlocal primary, head
            if self.primary is not primary:
                primary = self.primary
                head = ask(primary, "ROLE")[1]
            others = [server for server in self.servers if server is not primary]
            for stray in (server for server in others if not _follows(server, primary)):
                ask(stray, "REPLICAOF", "127.0.0.1", primary.port)
            views = [_facts(watcher) for watcher in self.sentinels]
            return (
                {view["port"] for view in views} == {str(primary.port)}
                and all(view["flags"] == "master" for view in views)
                and all(_follows(server, primary) and ask(server, "ROLE")[4] >= head for server in others)
            )

        until(whole, "the Sentinels agree and the replicas have everything", seconds=60.0)

    def failover(self) -> ValkeyServer:
        """Has the Sentinels make a replica the primary; returns it. The old primary becomes its replica."""
        old = self.primary
        # Right after another failover the Sentinel may say that it is not the time yet.
        until(lambda: ask(self._running()[0], "SENTINEL", "FAILOVER", SERVICE) in ("OK", True), "the failover began")
        return self.wait_for_successor(old)

    def wait_for_successor(self, old: ValkeyServer) -> ValkeyServer:
        """Returns the primary that came after this one, once every running Sentinel names it."""

        def agreed() -> bool:
            ports = {self._named(watcher) for watcher in self._running()}
            return len(ports) == 1 and ports != {old.port} and ask(self.primary, "ROLE")[0] == "master"

        until(agreed, "a replica took over")
        return self.primary

    def rejoin(self, server: ValkeyServer) -> None:
        """Makes a server that was started again a replica of the primary; the Sentinels would take ten seconds."""
        ask(server, "REPLICAOF", "127.0.0.1", self.primary.port)
        self.wait_until_ok()

    def _running(self) -> list[ValkeyServer]:
        return [watcher for watcher in self.sentinels if watcher.running and not watcher.frozen]

    def _named(self, watcher: ValkeyServer) -> int:
        return int(ask(watcher, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])


def _follows(server: ValkeyServer, primary: ValkeyServer) -> bool:
    role = ask(server, "ROLE")
    return bool(role[0] == "slave" and role[2] == primary.port and role[3] == "connected")


def _known_sentinels(watcher: ValkeyServer) -> int:
    return int(_facts(watcher)["num-other-sentinels"])


def _facts(watcher: ValkeyServer) -> dict[str, str]:
    facts = ask(watcher, "SENTINEL", "MASTER", SERVICE)
    return dict(zip(facts[::2], facts[1::2], strict=True))
