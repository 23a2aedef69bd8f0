"""The `initialize` that a session begins with: the session is there once it succeeded (P2)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from mcp_types import JSONRPCRequest
from starlette.requests import Request

from nonstick.core.event_ids import cursor_text
from nonstick.core.events import Kind, draft
from nonstick.core.record import UNCONFIRMED, opening_fields
from nonstick.core.refusals import (
    NEVER_OPENED,
    NOT_FOUND,
    NOT_OPENED,
    NOT_STORED,
    TOO_MANY_SESSIONS,
    TOO_MANY_SESSIONS_OF_PRINCIPAL,
    Refusal,
)
from nonstick.core.settings import EVERYBODY
from nonstick.errors import AlreadyExists, TooManySessions
from nonstick.session.exchange import Exchange
from nonstick.session.live import BeforeOpen, LiveSession
from nonstick.session.renewal import unattended_seconds
from nonstick.session.saving import Saving
from nonstick.store import Draft

__all__ = ["Opening"]


class Opening(Exchange):
    """Opens a session. A failed one leaves nothing of it, and tells its client no id.

    Args:
        session: Is in no store yet.
        principal: Opens the session; b"" without authentication.

    Attributes:
        is_visible: The session is in the store.
    """

    opens = True

    def __init__(
        self,
        session: LiveSession,
        message: JSONRPCRequest,
        request: Request,
        *,
        protocol_version: str,
        principal: bytes,
        gone: Callable[[], Awaitable[None]],
    ) -> None:
        version, head = protocol_version, session.log.head
        super().__init__(session, message, request, head=head, protocol_version=version, principal=principal, gone=gone)
        self.is_visible = False
        self._held_back: list[Draft] = []
        self._limit: asyncio.TimerHandle | None = None

    def client_left(self) -> None:
        # Nobody else was told of the session.
        self.end()
        super().client_left()

    def follow(self) -> None:
        # The session has no log yet, nor an expiry that would end it.
        seconds = unattended_seconds(self._services.settings)
        self._limit = asyncio.get_running_loop().call_later(seconds, self.fail, NEVER_OPENED)

    async def emit(self, event: Draft, expect: Sequence[str] = ()) -> None:
        """Keeps a message until the session is there."""
        self._held_back.append(event)

    def disconnect_client(self) -> None:
        self.answer.refuse(Refusal(NOT_STORED))

    def leave(self) -> None:
        super().leave()
        if self._limit is not None:
            self._limit.cancel()
        if not self.is_visible:
            self.session.end_soon()

    async def settle(self, answer: bytes | Refusal | None, *, failed: bool) -> None:
        """Makes the session visible, if its `initialize` succeeded, and gives the answer."""
        if answer is None or isinstance(answer, Refusal):
            self.answer.refuse(answer or Refusal(NOT_FOUND))
            return
        saving = Saving(self.session, self.message, answer, failed=failed)
        state = saving.state()
        if saving.failed:
            self.answer.give(saving.body)
        elif (refusal := await self._create(state)) is not None:
            self.answer.refuse(refusal)
        else:
            await self._send_held_back()
            if self._held_back or self._services.settings.answer == "sse":
                # What a middleware sent while the session was opened is on this request's stream, before the answer.
                terminal = draft(Kind.TERMINAL, saving.body)
                await self.own_stream().append([*self._held_back, terminal], terminal=True)
            self.answer.give(saving.body)

    async def _send_held_back(self) -> None:
        """Sends what waited on the standalone stream for the session to be in the store."""
        opening, self.session.opening = self.session.opening or BeforeOpen(), None
        for event in opening.messages:
            await self.session.emit(event)

    async def _create(self, state: dict[str, bytes | None]) -> Refusal | None:
        """Puts the session into the store, with this state. The refusal, if the store takes no further one."""
        session, settings = self.session, self._services.settings
        fields = opening_fields(*session.runner.handshake(), self.principal)
        if state:
            fields |= {name: data for name, data in state.items() if data is not None}
        if session.opening is not None:
            fields |= session.opening.fields
        fields |= session.services.owners.opening_fields()
        # Before the session is there: what comes later it is to hear, what came before it may (P11).
        fields["heard"] = (cursor_text(session.services.cluster_log.broadcasts.head) or "").encode()
        fields |= UNCONFIRMED if settings.confirms else {}
        try:
            await session.services.store.create(
                session.key, fields, lifetime=settings.first_lifetime, limits=settings.session_limits(self.principal)
            )
        except TooManySessions as error:
            return Refusal(TOO_MANY_SESSIONS if error.group == EVERYBODY else TOO_MANY_SESSIONS_OF_PRINCIPAL)
        except AlreadyExists:
            if not self.tries:
                # What is there is nobody's whom this client could ask for it. The next try draws another id.
                return Refusal(NOT_OPENED)
            # The task before this one made it, and was cancelled before it heard so.
        self.is_visible = True
        session.begin(fields)
        session.state.saved(state)
        session.services.owners.opened(session.key)
        return None
