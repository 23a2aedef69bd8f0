"""This process as a node: its lease, its sessions' live views, its tasks, and its drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Awaitable, Coroutine
from contextlib import AbstractContextManager
from contextvars import Context
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from mcp.server import Server

from nonstick.core.introductions import INTRODUCTIONS
from nonstick.core.refusals import SHUT_DOWN
from nonstick.core.settings import Settings
from nonstick.errors import SessionNotFound, StoreError, StoreUnavailable, without_text
from nonstick.http.sessionless import Sessionless
from nonstick.log.cluster_log import CLUSTER_KEY, ClusterLog
from nonstick.log.guard import GuardedStore
from nonstick.log.trim import Looks
from nonstick.node.exits import Exit, draining_on_signals, end_loop, note_exit, stop_host
from nonstick.node.placement import Placement
from nonstick.session.quotas import Quota
from nonstick.session.renewal import Renewal
from nonstick.store import Lease
from nonstick.waiting.deadline import Deadline

if TYPE_CHECKING:
    from nonstick.session.exchange import Exchange
    from nonstick.session.live import Session
    from nonstick.session.reader import Reader

__all__ = [
    "GONE_AFTER",
    "Counters",
    "Node",
    "begin_drain_here",
    "exit_in",
    "seconds_left_here",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TICK: Final = 1.0
_TOUCHED_AT_ONCE: Final = 256
_LAST_WORDS: Final = 0.4
"""Seconds that a handler which is ended by a drain gets to stop, before its request ends without it; and that the
store then gets to take the end."""
GONE_AFTER: Final = 1.5
"""Seconds after the grace period within which all that is the node's has ended (P8)."""
_FOR_THE_LEASE: Final = 0.3
"""Seconds of these that are kept for giving the lease back."""

_gone_by = 0.0
"""When, by the monotonic clock, what the last drain in this process ends has to have ended."""
_running: weakref.WeakSet[Node] = weakref.WeakSet()


def begin_drain_here() -> None:
    """Begins the drain of every node that runs in this event loop. May be called more than once."""
    loop = asyncio.get_running_loop()
    for node in list(_running):
        if node.loop is loop:
            node.begin_drain()


def exit_in(loop: asyncio.AbstractEventLoop, error: Exit) -> bool:
    """Has a node that runs in this loop, once that goes on, do what a handler's exit does. Whether there is one."""
    node = next((node for node in list(_running) if node.loop is loop), None)
    if node is not None:
        loop.call_soon(node.exit, error, context=Context())
    return node is not None


def seconds_left_here() -> float:
    """Until what the last drain in this process ends has to have ended; 0 if there was none."""
    return max(_gone_by - time.monotonic(), 0.0)


@dataclass(slots=True)
class Counters:
    """What happened on this node since it started."""

    standalone_dropped: int = 0
    rescued: int = 0
    reexecuted: int = 0


class Node:
    """One process start. Never reused: its id is its name and a random incarnation."""

    def __init__(
        self,
        server: Server[Any],
        lifespan_state: Any,
        store: GuardedStore,
        settings: Settings,
        *,
        name: str | None,
        cluster_log: ClusterLog,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        name = name or os.environ.get("NONSTICK_NODE") or f"{socket.gethostname()}-{os.getpid()}"
        self.name = name
        self.id = f"{name}-{secrets.token_hex(4)}"
        self.server = server
        self.lifespan_state = lifespan_state
        self.store = store
        self.settings = settings
        self.cluster_log = cluster_log
        self.whose = ""
        """Identity of the server, as the cluster knows it."""
        self.counters = Counters()
        self.looks = Looks()
        """At logs that are over their bounds, or were."""
        self.sessions: dict[str, Session] = {}
        self.readers: set[Reader] = set()
        self.requests = Quota(
            settings.max_streams_per_node,
            503,
            "This node is running as many requests as it may; try again",
            share=settings.max_principal_share,
            share_message="You have as many requests running on this node as one principal may; wait for some to end",
        )
        self.listeners = Quota(
            settings.max_listeners_per_node,
            503,
            "As many streams are open on this node as it may keep; try again",
            share=settings.max_principal_share,
            share_message="You have as many streams open on this node as one principal may; close one",
        )
        self.sessionless = Sessionless(SHUT_DOWN, lifetime=settings.connection_lifetime)
        self.draining = False
        """Other nodes are to take what comes."""
        self._exit: Exit | None = None
        """What a handler raised that wants the process to end."""
        self._host_stops = False
        self.until_closing: dict[Deadline, None] = {}
        """What waits for somebody else, and ends when the node closes: requests that arrive, responses that are taken
        slowly, GETs that are being prepared."""
        self._left = asyncio.Event()
        self._grace_ends = 0.0
        self.stopped = False
        """It is over: what still runs is cancelled, and says no more."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._keeper = _LeaseKeeper(self)
        self.placement = Placement(self)
        self._renewal = Renewal(self)

    async def __aenter__(self) -> Self:
        self._keeper.start()
        _running.add(self)
        self.spawn(self._keeper.tick())
        self.spawn(self._touch(min(self.settings.lifetime / 5, 60.0)))
        if self.settings.confirms:
            self.spawn(self._touch(self.settings.first_lifetime / 5, unconfirmed=True))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        try:
            await self.drain()
            await self._in_time(self._clean_up())
            self.stopped = True
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            if tasks:
                # Not for ever: a handler in a thread cannot be stopped, and the lease is to be given back.
                await asyncio.wait(tasks, timeout=min(_LAST_WORDS, self._seconds_left(_FOR_THE_LEASE)))
        finally:
            _running.discard(self)
            await self._keeper.stop(self._seconds_left())
            if self._exit is not None and self._host_stops:
                # Not now: what the host's lifespan still has to do is done first.
                end_loop(self._exit, after=asyncio.current_task())

    async def _clean_up(self) -> None:
        """Runs the clean-up of the sessions that are here (`exit_stack`)."""
        await self.placement.give_up_all()
        closing = [session.close() for session in list(self.sessions.values())]
        for error in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(error, Exception):
                logger.error("a session's clean-up raised", exc_info=without_text(error))

    async def _in_time(self, work: Coroutine[Any, Any, None]) -> None:
        """Waits for this while there is time. What it does not do until then, it may go on with."""
        task = asyncio.create_task(work)
        await asyncio.wait([task], timeout=self._seconds_left(_FOR_THE_LEASE + _LAST_WORDS / 2))
        if task.done():
            task.result()
        else:
            logger.warning("the clean-up of sessions (exit_stack) was not done in time, and is cancelled")
            task.cancel()

    def _seconds_left(self, reserve: float = 0.0) -> float:
        """Until all that is the node's must have ended, less what is kept for later."""
        return max(self._grace_ends + GONE_AFTER - reserve - asyncio.get_running_loop().time(), 0.0)

    def spawn(self, work: Coroutine[Any, Any, T], context: Context | None = None) -> asyncio.Task[T]:
        """Runs this in the background, until the node stops at the latest.

        Args:
            context: A request's, for what is done for that request alone; by default an empty one. What goes on for
                others must not go on in the context of the request that happened to begin it.
        """
        task = asyncio.create_task(work, context=Context() if context is None else context)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def contained(self, work: Awaitable[T], what: str, *args: object) -> T | None:
        """What somebody else's code gives that is run here in the background; None if it ended in any other way.

        For a task of its own: what that code leaves of it is fit for nothing else.
        """
        try:
            return await work
        except BaseException as error:
            self.report(error, what, *args)
        return None

    def report(self, error: BaseException, what: str, *args: object) -> None:
        """Logs that somebody else's code ended with this; has the process end if that is what it says."""
        if isinstance(error, SystemExit | KeyboardInterrupt):
            self.exit(error)
        elif not self.stopped:
            logger.error(f"{what} raised", *args, exc_info=without_text(error))

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, StoreError):
                logger.warning("a background task gave up: %s", type(error).__name__)
            else:
                logger.error("a background task failed", exc_info=without_text(error))

    async def _touch(self, period: float, *, unconfirmed: bool = False) -> None:
        """Sessions whose client is seen here do not expire; those that are `unconfirmed` are looked at more often."""
        while True:
            await asyncio.sleep(period)
            if not unconfirmed:
                INTRODUCTIONS.age()
            keys = self._renewal.due(unconfirmed=unconfirmed)
            late = False
            try:
                if not unconfirmed:
                    # Loaded, so that it comes under the encryption key of today, too.
                    await self.store.load(CLUSTER_KEY)
            except SessionNotFound:
                pass  # whoever follows it makes it anew
            except StoreUnavailable:
                late = True
            for start in range(0, len(keys), _TOUCHED_AT_ONCE):
                try:
                    await self.store.touch(keys[start : start + _TOUCHED_AT_ONCE])
                except StoreUnavailable:
                    # A part of the store may be away: those whose part is there are not to expire for that (P9).
                    late = True
            if late:
                logger.warning("the store cannot be reached: open sessions could not be renewed")

    # ---- drain

    def begin_drain(self) -> None:
        """Stops taking work (P8). May be called more than once."""
        if self.draining:
            return
        self.draining = True
        self._grace_ends = asyncio.get_running_loop().time() + self.settings.grace
        self.store.end_at(self._grace_ends + GONE_AFTER)
        global _gone_by
        _gone_by = time.monotonic() + self.settings.grace + GONE_AFTER
        for reader in list(self.readers):
            reader.hand_over()
        self.sessionless.end_listening()
        self.spawn(self._end_in_time())
        self.spawn(self.placement.give_up_idle())

    @property
    def is_closing(self) -> bool:
        """The grace period is over: what began now would be ended at once."""
        return self.draining and asyncio.get_running_loop().time() >= self._grace_ends

    async def drain(self) -> None:
        """Drains, and returns when everything here has finished, or been ended at the end of the grace period."""
        self.begin_drain()
        patience = self._grace_ends + 2 * _LAST_WORDS - asyncio.get_running_loop().time()
        await self._finished(max(patience, 0.0))

    async def _end_in_time(self) -> None:
        """Ends what still runs after the grace period, also what began in the meantime."""
        await asyncio.sleep(self.settings.grace)
        while True:
            for reader in self._staying():
                reader.cut_off()
            self.sessionless.end_all()
            if running := self._running():
                logger.warning("%d requests did not finish in %g s of grace", len(running), self.settings.grace)
            for exchange in running:
                exchange.fail(SHUT_DOWN)
            await asyncio.sleep(_LAST_WORDS)
            for exchange in running:
                self.spawn(exchange.abandon())
            await asyncio.sleep(_LAST_WORDS)
            for exchange in running:
                exchange.let_go()
            self.store.end_pending()
            for deadline in list(self.until_closing):
                deadline.hasten()

    async def _finished(self, patience: float) -> None:
        """Waits until no request runs here, or the patience is over."""
        try:
            async with asyncio.timeout(patience):
                while self._running() or self._staying() or len(self.sessionless):
                    await self.next_to_leave()
        except TimeoutError:
            pass

    async def next_to_leave(self) -> None:
        """Waits until a request, or the handler of a notification, has finished."""
        self._left.clear()
        await self._left.wait()

    def left(self) -> None:
        """A request, or the handler of a notification, has finished."""
        self._left.set()

    def _running(self) -> list[Exchange]:
        return [exchange for session in self.sessions.values() for exchange in session.exchanges.values()]

    def _staying(self) -> list[Reader]:
        return [reader for reader in self.readers if reader.stays]

    def signals(self) -> AbstractContextManager[None]:
        """Drains on SIGTERM and SIGINT, before the host does what it does on them (P8)."""
        return draining_on_signals(self.begin_drain)

    def exit(self, error: Exit) -> None:
        """A handler wants the process to end: as on SIGTERM, then with its exit status where the host lets that be."""
        if self._exit is not None:
            return
        self._exit = error
        note_exit(error)
        logger.warning("a handler raised %s: this node drains, then its process ends", type(error).__name__)
        self.begin_drain()
        self._host_stops = stop_host()
        if not self._host_stops:
            self.spawn(self._exit_when_drained(error))

    async def _exit_when_drained(self, error: Exit) -> None:
        """Ends the event loop once nothing runs here, for a host that cannot be told to stop."""
        await self.drain()
        for _ in range(20):
            if not len(self.requests):  # whose answers are on their way out
                break
            await asyncio.sleep(_LAST_WORDS / 10)
        end_loop(error)


class _LeaseKeeper:
    """Renews the node's lease from a thread, while the event loop has ticked within `max_stall`.

    A thread, because a tool that blocks the loop does not make its node dead; a tick, because a loop that hangs for
    good does (P7).
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._ticked = time.monotonic()
        self._stop = threading.Event()
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._keep, name="nonstick-lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def stop(self, seconds: float) -> None:
        """Ends the lease, if the store can be reached within so many seconds. Other work goes on meanwhile.

        Else the lease lapses by itself; the thread does not keep the process.
        """
        self._stop.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

    async def tick(self) -> None:
        while True:
            self._ticked = time.monotonic()
            await asyncio.sleep(min(_TICK, self._node.settings.max_stall / 4))

    def _keep(self) -> None:
        settings = self._node.settings
        lease: Lease | None = None
        wait = 0.0
        while not self._stop.wait(wait):
            wait = settings.lease / 3
            if time.monotonic() - self._ticked > settings.max_stall:
                continue
            try:
                lease = lease or self._node.store.lease(self._node.id)
                lease.renew(settings.lease)
            except StoreError as error:
                logger.warning("the lease of this node could not be renewed: %s", error)
                wait = min(1.0, wait)
        if lease is not None:
            lease.close(release=True)
        with contextlib.suppress(RuntimeError):  # the loop did not wait for it
            self._loop.call_soon_threadsafe(self._ended.set)
