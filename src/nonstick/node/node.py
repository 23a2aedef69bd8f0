"""This process as a node: its sessions' live views, its services, its beginning and its end."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import weakref
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager
from contextvars import Context
from types import TracebackType
from typing import Any, Final, Self

from nonstick.core.introductions import INTRODUCTIONS
from nonstick.core.record import Record
from nonstick.core.refusals import (
    NODE_RUNS_TOO_MANY,
    NODE_STREAMS_TOO_MANY,
    PRINCIPAL_RUNS_TOO_MANY,
    PRINCIPAL_STREAMS_TOO_MANY,
    TOO_MANY_RESUMED,
    TOO_MANY_STREAMS,
)
from nonstick.core.settings import Settings
from nonstick.errors import SessionNotFound, StoreUnavailable, without_text
from nonstick.log.cluster_log import CLUSTER_KEY, ClusterLog
from nonstick.log.guard import GuardedStore
from nonstick.log.lookout import Lookout
from nonstick.log.session_log import Logs
from nonstick.log.trim import Trimming
from nonstick.node.drain import STOP_SECONDS, Drain, Guest
from nonstick.node.exits import draining_on_signals, end_loop, note_exit, stop_host
from nonstick.node.lease import LeaseKeeper
from nonstick.node.placement import Placement
from nonstick.session.live import LiveSession
from nonstick.session.quotas import Quota, QuotaOfEach
from nonstick.session.renewal import Renewal
from nonstick.session.services import Reading, Served, Services
from nonstick.session.views import SessionViews
from nonstick.store import Loaded
from nonstick.waiting.tasks import Exit, Tasks

__all__ = ["Node", "begin_drain_here", "exit_in"]

logger = logging.getLogger(__name__)

_TOUCHED_AT_ONCE: Final = 256
_LEASE_SECONDS: Final = 0.3
"""Seconds at the node's end that are kept for giving the lease back."""

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


class Node:
    """One process start. Never reused: its id is its name and a random incarnation.

    Args:
        guests: What else runs on it until its drain.

    Attributes:
        sessions: Those with a live view here, by their keys.
        listeners: GETs, of all sessions, that are open here.
        session_listeners: Those of each session that are connections to its standalone stream.
        session_resumptions: Those of each session that resume the stream of a request.
    """

    def __init__(
        self,
        served: Served,
        store: GuardedStore,
        settings: Settings,
        *,
        cluster_log: ClusterLog,
        guests: Sequence[Guest] = (),
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.name = settings.node_name or os.environ.get("NONSTICK_NODE") or f"{socket.gethostname()}-{os.getpid()}"
        self.sessions = SessionViews()
        readers: set[Reading] = set()
        tasks = Tasks(self.exit)
        self._drain = Drain(store, settings, tasks, self.sessions, readers, guests)
        node_id = f"{self.name}-{secrets.token_hex(4)}"
        self.services = Services(
            node_id=node_id,
            served=served,
            store=store,
            settings=settings,
            tasks=tasks,
            drain=self._drain,
            views=self.sessions,
            readers=readers,
            requests=Quota(
                settings.max_streams_per_node,
                NODE_RUNS_TOO_MANY,
                share=settings.max_principal_share,
                share_held=PRINCIPAL_RUNS_TOO_MANY,
            ),
            logs=Logs(store, Trimming(store, settings, tasks.spawn), Lookout(store), node_id),
            cluster_log=cluster_log,
        )
        self.placement = self.services.owners = Placement(self.services, self.sessions)
        self.listeners = Quota(
            settings.max_listeners_per_node,
            NODE_STREAMS_TOO_MANY,
            share=settings.max_principal_share,
            share_held=PRINCIPAL_STREAMS_TOO_MANY,
        )
        self.session_listeners = QuotaOfEach(settings.max_listeners, TOO_MANY_STREAMS)
        self.session_resumptions = QuotaOfEach(settings.max_streams, TOO_MANY_RESUMED)
        self._exit: Exit | None = None
        """What a handler raised that wants the process to end."""
        self._host_stops = False
        self._lease = LeaseKeeper(self.services.node_id, store, settings)
        self._renewal = Renewal(self.sessions, readers, settings)

    def hydrate(self, session_id: str, key: str, loaded: Loaded, record: Record) -> LiveSession:
        """This node's view of a stored session: the one that is there, brought up to date, or a new one (P2)."""
        session = self.sessions.take(key, loaded, record)
        if session is None:
            session = self.sessions[key] = LiveSession(self.services, session_id, key)
            session.refresh(loaded, record)
        return session

    async def __aenter__(self) -> Self:
        settings, spawn = self.services.settings, self.services.tasks.spawn
        self._lease.start()
        _running.add(self)
        spawn(self._lease.tick())
        spawn(self._touch(min(settings.lifetime / 5, 60.0)))
        if settings.confirms:
            spawn(self._touch(settings.first_lifetime / 5, unconfirmed=True))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        try:
            await self.drain()
            await self._in_time(self._clean_up())
            # Not for ever: the lease is to be given back.
            await self.services.tasks.stop(min(STOP_SECONDS, self._drain.seconds_left(_LEASE_SECONDS)))
        finally:
            _running.discard(self)
            await self._lease.stop(self._drain.seconds_left())
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
        await asyncio.wait([task], timeout=self._drain.seconds_left(_LEASE_SECONDS + STOP_SECONDS / 2))
        if task.done():
            task.result()
        else:
            logger.warning("the clean-up of sessions (exit_stack) was not done in time, and is cancelled")
            task.cancel()

    async def _touch(self, period: float, *, unconfirmed: bool = False) -> None:
        """Sessions whose client is seen here do not expire; those that are `unconfirmed` are looked at more often."""
        store = self.services.store
        while True:
            await asyncio.sleep(period)
            if not unconfirmed:
                INTRODUCTIONS.age()
                self.sessions.age()
            keys = self._renewal.due(unconfirmed=unconfirmed)
            late = False
            try:
                if not unconfirmed:
                    # Loaded, so that it comes under the encryption key of today, too.
                    await store.load(CLUSTER_KEY)
            except SessionNotFound:
                pass  # the follower of the cluster log makes it anew
            except StoreUnavailable:
                late = True
            for start in range(0, len(keys), _TOUCHED_AT_ONCE):
                try:
                    await store.touch(keys[start : start + _TOUCHED_AT_ONCE])
                except StoreUnavailable:
                    # A part of the store may be away: those whose part is there are not to expire for that (P9).
                    late = True
            if late:
                logger.warning("the store cannot be reached: open sessions could not be renewed")

    # ---- its end

    def begin_drain(self) -> None:
        """Stops taking work (P8). May be called more than once."""
        if not self._drain.begun:
            self._drain.begin()
            self.services.tasks.spawn(self.placement.give_up_idle())

    async def drain(self) -> None:
        """Drains, and returns when everything here has finished, or been ended at the end of the grace period."""
        self.begin_drain()
        await self._drain.finished()

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
            self.services.tasks.spawn(self._exit_when_drained(error))

    async def _exit_when_drained(self, error: Exit) -> None:
        """Ends the event loop once nothing runs here, for a host that cannot be told to stop."""
        await self.drain()
        for _ in range(20):
            if not len(self.services.requests):  # whose answers are on their way out
                break
            await asyncio.sleep(STOP_SECONDS / 10)
        end_loop(error)
