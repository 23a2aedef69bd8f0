"""Which sessions this node keeps from expiring (P10).

Expiry counts from the last sign of the client: a request, reply or cancel renews it where it is loaded; an open
connection that takes bytes is renewed here, by the node that it is open at. What only runs here, for a client that is
not seen, keeps its session for a bounded time. Then it expires as any other, and with that its handlers are cancelled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping

from nonstick.core.record import CONFIRMED
from nonstick.core.settings import Settings
from nonstick.errors import SessionNotFound, StoreUnavailable
from nonstick.session.live import LiveSession
from nonstick.session.services import Reading

__all__ = ["Renewal", "confirm", "unattended_seconds"]


def unattended_seconds(settings: Settings) -> float:
    """How long what runs on may keep its session after the client's last sign."""
    return max(settings.unattended_timeout or 0.0, settings.lifetime)


def confirm(session: LiveSession) -> None:
    """A request of this session succeeded: from here on it has its full lifetime."""
    if session.record.unconfirmed:
        session.note(unconfirmed=False)
        session.spawn(_confirm(session))


async def _confirm(session: LiveSession) -> None:
    services = session.services
    try:
        await services.store.update(session.key, CONFIRMED, lifetime=services.settings.lifetime)
    except SessionNotFound:
        pass
    except StoreUnavailable:
        # The next request does it; until then it is renewed as often as its short lifetime wants.
        session.note(unconfirmed=True)
        raise


class Renewal:
    """This node's part in keeping sessions from expiring."""

    def __init__(self, sessions: Mapping[str, LiveSession], readers: Collection[Reading], settings: Settings) -> None:
        self._sessions = sessions
        self._readers = readers
        self._settings = settings

    def due(self, *, unconfirmed: bool = False) -> list[str]:
        """Keys of the sessions to renew now; of the `unconfirmed` ones alone, which have a shorter lifetime."""
        now = asyncio.get_running_loop().time()
        self._close_old_streams(now)
        reading = {reader.key for reader in self._readers if reader.shows_client(now)}
        return [
            key
            for key, session in self._sessions.items()
            if self._is_due(session, now, is_read=key in reading) and session.record.unconfirmed >= unconfirmed
        ]

    def _is_due(self, session: LiveSession, now: float, *, is_read: bool) -> bool:
        if is_read or any(exchange.answer.shows_client(now) for exchange in session.exchanges.values()):
            session.log.heard_at = time.monotonic()
            return True
        return session.users > 0 and time.monotonic() - session.log.heard_at < self._extra_seconds(session)

    def _extra_seconds(self, session: LiveSession) -> float:
        """How long after the client's last sign the last renewal may be, so that the session expires in time."""
        settings = self._settings
        granted = settings.first_lifetime if session.record.unconfirmed else settings.lifetime
        return unattended_seconds(settings) - granted

    def _close_old_streams(self, now: float) -> None:
        """A client that reads comes back, and is seen by that. One that does not read may keep a connection for days,
        in which pings fill the buffers of two kernels."""
        began_before = now - self._settings.connection_lifetime
        for reader in list(self._readers):
            if reader.began < began_before:
                reader.hand_over()
        for session in self._sessions.values():
            for exchange in session.exchanges.values():
                if exchange.answer.began < began_before:
                    exchange.answer.hand_over()
