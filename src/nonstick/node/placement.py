"""Which node holds a session, with `placement="owner"`; and what becomes of it when that node is lost (P7, P8).

The record's field `owner` names the node. It changes by compare-and-set alone, so that of several nodes that would take
the session one does. As everywhere, leases give liveness only: what a woken owner of old runs has been fenced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any, Final

from nonstick.core.owners import HERE, Step, Suspects, Where, find, next_step, owner_in
from nonstick.core.record import LOST, OWNER
from nonstick.core.refusals import HOLDER_GONE, SESSION_LOST, Refusal
from nonstick.errors import StoreError
from nonstick.log.lost import end_open
from nonstick.log.survey import survey
from nonstick.node.holding import Holding, announce
from nonstick.session.live import LiveSession
from nonstick.session.services import Services
from nonstick.store import Loaded

__all__ = ["Placement"]

logger = logging.getLogger(__name__)

_CERTAIN_AFTER: Final = 1.0
"""Seconds that a node must be seen dead for: after an outage of the store the living need a moment to renew."""

_LINGER: Final = 5.0
"""Seconds for which a lost session stays in the store, so that clients which read its streams read their end."""

_PARTING: Final = 5.0
"""Seconds, at most, for telling the store at the end of a drain."""


class Placement:
    """The sessions that this node holds, those that it takes, and those that it finds lost.

    Args:
        sessions: Those with a live view here.

    Attributes:
        held: This node's hold on each session that it holds, by the session's key.
        relayed: Of each session that another node holds, by its key: the keys of the requests that came here for it.
    """

    def __init__(self, services: Services, sessions: Mapping[str, LiveSession]) -> None:
        self.held: dict[str, Holding] = {}
        self.relayed: dict[str, set[str]] = {}
        self._services = services
        self._sessions = sessions
        self._owns = services.settings.placement == "owner"
        self._suspects = Suspects()
        self._working: dict[str, asyncio.Task[None]] = {}
        """Of each session that is being taken or ended here, the task that does it."""

    # ---- sessions that begin here

    def opening_fields(self) -> dict[str, bytes]:
        """What the record of a session that is opened here says of its owner."""
        return {OWNER: self._services.node_id.encode()} if self._owns else {}

    def opened(self, key: str, /) -> None:
        """The session is in the store: if it is to have an owner, this node is it."""
        if self._owns:
            Holding(self._sessions[key], self.held).begin()

    # ---- requests that arrive here

    def where(self, session: LiveSession, loaded: Loaded) -> Where:
        """The node that is to run what arrived here for this session.

        Raises:
            Refusal: The node that held it is gone, and the session with it.
        """
        if not self._owns and OWNER not in loaded.fields:
            return HERE
        owner = owner_in(loaded.fields)
        held = self.held.get(session.key)
        found = find(owner, here=self._services.node_id, ready=None if held is None else held.ready)
        if found.looks and held is not None:
            session.spawn(held.look())
        if found.settles:
            session.spawn(self.settle(session.key))
        if found.where is None:
            raise Refusal(HOLDER_GONE)
        return found.where

    @contextlib.contextmanager
    def relaying(self, key: str, request: str) -> Iterator[None]:
        """While the block runs, another node runs this request of the session."""
        relayed = self.relayed.setdefault(key, set())
        relayed.add(request)
        try:
            yield
        finally:
            relayed.discard(request)
            if not relayed:
                del self.relayed[key]

    # ---- sessions whose owner may be lost

    async def is_owned(self, key: str, /) -> bool:
        """Whether this session has, or is to have, an owner."""
        return self._owns or await self._owner(key) is not None

    async def settle(self, key: str, /, *, gone: str = "") -> None:
        """Sees to a session that nobody holds: takes it if it can be built anew here, else ends it.

        Returns before it was taken, but not before it was ended. Does nothing while the owner lives, or if this node
        drains: what waits is then served from elsewhere.

        Args:
            gone: A node that is known to be dead.

        Raises:
            SessionNotFound, StoreUnavailable: As the store's methods.
        """
        session = self._sessions.get(key)
        if session is None or self._services.drain.begun or self._is_seen_to(key):
            return
        owner = await self._owner(key)
        if owner is None and not self._owns:
            return
        named = owner and owner not in (LOST, self._services.node_id, gone)
        lives = bool(named) and not await self._is_dead(owner or "")
        if self._is_seen_to(key):
            return
        match next_step(owner, lives=lives, rebuilds=self._services.settings.rehydrate is not None):
            case Step.END:
                await asyncio.shield(self._work(session, self._end(session, owner or "")))
            case Step.TAKE:
                self._work(session, self._take(session, owner))
            case Step.LEAVE:
                pass

    def _is_seen_to(self, key: str) -> bool:
        return key in self.held or key in self._working

    async def _owner(self, key: str) -> str | None:
        return owner_in((await self._services.store.load(key, renew=False)).fields)

    def _work(self, session: LiveSession, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._working[session.key] = session.spawn(work)
        task.add_done_callback(lambda _: self._working.pop(session.key, None))
        return task

    async def _is_dead(self, owner: str) -> bool:
        """Whether the node's lease has lapsed, and had some time ago already."""
        lapsed = bool(await self._services.store.lapsed([owner]))
        return self._suspects.seen(owner, lapsed, asyncio.get_running_loop().time()) >= _CERTAIN_AFTER

    async def _take(self, session: LiveSession, previous: str | None) -> None:
        """Makes this node the owner, unless another one has become it."""
        me = self._services.node_id.encode()
        expected = None if previous is None else previous.encode()
        if await self._services.store.update(session.key, {OWNER: me}, expect={OWNER: expected}):
            logger.info("session %s: taken by this node", session.key[:12])
            await Holding(session, self.held).take(previous)

    async def _end(self, session: LiveSession, previous: str) -> None:
        """Ends a session that cannot be built anew: its streams with an error, then the session itself."""
        store = self._services.store
        expected = {OWNER: previous.encode()}
        if previous != LOST and not await store.update(session.key, {OWNER: LOST.encode()}, expect=expected):
            return
        logger.warning("session %s: ended, because the node that held it is gone", session.key[:12])
        await announce(session.log, LOST)
        for stream in (await survey(store, session.key)).open:
            await end_open(session.log.append, stream, SESSION_LOST)
        self._services.tasks.spawn(self._delete_later(session.key))

    async def _delete_later(self, key: str) -> None:
        await asyncio.sleep(_LINGER)
        await self._services.store.delete(key)

    # ---- drain

    async def give_up_idle(self) -> None:
        """While the node drains: sessions in which nothing runs are left to other nodes at once (P8)."""
        while self._services.settings.rehydrate is not None:
            if not (idle := [held for held in self.held.values() if held.idle]):
                # With no other `await` between the look and the wait, or a request that leaves would be missed.
                await self._services.drain.next_to_leave()
            for held in idle:
                await held.clean_up()
                with contextlib.suppress(StoreError):
                    await held.hand_on()

    async def give_up_all(self) -> None:
        """The node stops: its sessions are left to other nodes, or end, with their clean-up run (P6, P8)."""
        await asyncio.gather(*(self._give_up(one) for one in list(self.held.values())), return_exceptions=True)

    async def _give_up(self, one: Holding) -> None:
        try:
            await one.clean_up()
        finally:
            async with asyncio.timeout(_PARTING):
                await one.hand_on()
