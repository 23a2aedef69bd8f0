"""Which node holds a session, with `placement="owner"`; and what becomes of it when that node is lost (P7, P8).

The record's field `owner` names the node. It changes by compare-and-set alone, so that of several nodes that would take
the session one does. As everywhere, leases give liveness only: what a woken owner of old runs has been fenced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping
from typing import Any, Final

from nonstick.core.record import LOST, OWNER
from nonstick.core.refusals import HOLDER_GONE, SESSION_LOST, Refusal
from nonstick.errors import StoreError
from nonstick.log.lost import end_open
from nonstick.log.survey import survey
from nonstick.node.holding import Holding, announce
from nonstick.session.live import Session
from nonstick.session.services import Services
from nonstick.store import Loaded

__all__ = ["Placement"]

logger = logging.getLogger(__name__)

_CERTAIN_AFTER: Final = 1.0
"""Seconds that a node must be seen dead for: after an outage of the store the living need a moment to renew."""

_FORGET_AFTER: Final = 30.0

_LINGER: Final = 5.0
"""Seconds for which a lost session stays in the store, so that whoever reads its streams reads their end."""

_PARTING: Final = 5.0
"""Seconds, at most, for telling the store at the end of a drain."""


class Placement:
    """The sessions that this node holds, those that it takes, and those that it finds lost.

    Args:
        sessions: Those with a live view here.
    """

    def __init__(self, services: Services, sessions: Mapping[str, Session]) -> None:
        self._services = services
        self._sessions = sessions
        self._suspects: dict[str, tuple[float, float]] = {}
        """Of each node that was seen dead, when first and when last."""
        self._working: dict[str, asyncio.Task[None]] = {}
        """Of each session that is being taken or ended here, the task that does it."""

    @property
    def _owns(self) -> bool:
        return self._services.settings.placement == "owner"

    # ---- sessions that begin here

    def opening_fields(self) -> dict[str, bytes]:
        """What the record of a session that is opened here says of its owner."""
        return {OWNER: self._services.node_id.encode()} if self._owns else {}

    def opened(self, key: str, /) -> None:
        """The session is in the store: if it is to have an owner, this node is it."""
        if self._owns:
            _holding(self._sessions[key]).begin()

    # ---- requests that arrive here

    def elsewhere(self, session: Session, loaded: Loaded) -> str | None:
        """The node that is to run what arrived here for this session, "" if none holds it; None for this one.

        Raises:
            Refusal: The node that held it is gone, and the session with it.
        """
        owner = _owner(loaded)
        if owner is None and not self._owns:
            return None
        held = session.held
        if held is not None and owner != self._services.node_id:
            session.spawn(held.look())
        elif held is not None and held.ready:
            return None
        if owner == LOST:
            session.spawn(self.settle(session.key))
            raise _gone()
        if not owner:
            session.spawn(self.settle(session.key))
        return owner or ""

    # ---- sessions whose owner may be lost

    async def is_owned(self, key: str, /) -> bool:
        """Whether this session has, or is to have, an owner."""
        return self._owns or _owner(await self._services.store.load(key, renew=False)) is not None

    async def settle(self, key: str, /, *, gone: str = "") -> None:
        """Sees to a session that nobody holds: takes it if it can be built anew here, else ends it.

        Returns before it was taken, but not before it was ended. Does nothing while the owner lives, or if this node
        drains: what waits is then served from elsewhere.

        Args:
            gone: A node that is known to be dead.

        Raises:
            SessionNotFound, StoreUnavailable: As the store's methods.
        """
        services = self._services
        session = self._sessions.get(key)
        if session is None or services.drain.begun or session.held is not None or key in self._working:
            return
        owner = _owner(await services.store.load(key, renew=False))
        if owner is None and not self._owns:
            return
        lives = owner and owner not in (LOST, services.node_id, gone) and not await self._is_dead(owner)
        if lives or session.held is not None or key in self._working:
            return
        if owner == LOST or (owner is not None and services.settings.rehydrate is None):
            await asyncio.shield(self._work(session, self._end(session, owner)))
        else:
            self._work(session, self._take(session, owner))

    def _work(self, session: Session, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._working[session.key] = session.spawn(work)
        task.add_done_callback(lambda _: self._working.pop(session.key, None))
        return task

    async def _is_dead(self, owner: str) -> bool:
        """Whether the node's lease has lapsed, and had some time ago already."""
        if not await self._services.store.lapsed([owner]):
            self._suspects.pop(owner, None)
            return False
        now = asyncio.get_running_loop().time()
        self._suspects = {name: seen for name, seen in self._suspects.items() if now - seen[1] < _FORGET_AFTER}
        first, _ = self._suspects.setdefault(owner, (now, now))
        self._suspects[owner] = first, now
        return now - first >= _CERTAIN_AFTER

    async def _take(self, session: Session, previous: str | None) -> None:
        """Makes this node the owner, unless another one has become it."""
        me = self._services.node_id.encode()
        expected = None if previous is None else previous.encode()
        if await self._services.store.update(session.key, {OWNER: me}, expect={OWNER: expected}):
            logger.info("session %s: taken by this node", session.key[:12])
            await _holding(session).take(previous)

    async def _end(self, session: Session, previous: str) -> None:
        """Ends a session that cannot be built anew: its streams with an error, then the session itself."""
        store = self._services.store
        expected = {OWNER: previous.encode()}
        if previous != LOST and not await store.update(session.key, {OWNER: LOST.encode()}, expect=expected):
            return
        logger.warning("session %s: ended, because the node that held it is gone", session.key[:12])
        await announce(session, LOST)
        for stream in (await survey(store, session.key)).open:
            await end_open(session.append, stream, SESSION_LOST)
        self._services.tasks.spawn(self._delete_later(session.key))

    async def _delete_later(self, key: str) -> None:
        await asyncio.sleep(_LINGER)
        await self._services.store.delete(key)

    # ---- drain

    def _held(self) -> list[Holding]:
        return [session.held for session in self._sessions.values() if session.held is not None]

    async def give_up_idle(self) -> None:
        """While the node drains: sessions in which nothing runs are left to other nodes at once (P8)."""
        while self._services.settings.rehydrate is not None:
            if not (idle := [held for held in self._held() if held.idle]):
                # With no other `await` in between: another may leave meanwhile.
                await self._services.drain.next_to_leave()
            for held in idle:
                await held.clean_up()
                with contextlib.suppress(StoreError):
                    await held.let_go()

    async def give_up_all(self) -> None:
        """The node stops: its sessions are left to other nodes, or end, with their clean-up run (P6, P8)."""
        await asyncio.gather(*(self._give_up(one) for one in self._held()), return_exceptions=True)

    async def _give_up(self, one: Holding) -> None:
        try:
            await one.clean_up()
        finally:
            async with asyncio.timeout(_PARTING):
                await one.let_go()


def _owner(loaded: Loaded) -> str | None:
    owner = loaded.fields.get(OWNER)
    return None if owner is None else owner.decode()


def _holding(session: Session) -> Holding:
    session.held = Holding(session)
    return session.held


def _gone() -> Refusal:
    return Refusal(HOLDER_GONE)
