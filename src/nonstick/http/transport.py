"""One session's transport, for applications that do their own routing: any node builds it from the session's id."""

from __future__ import annotations

from typing import Self

from starlette.types import Receive, Scope, Send

from nonstick.core.principals import principal_of
from nonstick.core.record import Record
from nonstick.core.refusals import NO_ID, Refusal
from nonstick.errors import SessionNotFound
from nonstick.http.intake import TRANSPORT
from nonstick.http.manager import SessionManager

__all__ = ["Session"]


class Session:
    """Serves the HTTP requests of one session, which may have been opened on any node (P1).

    There is nothing to keep in a dictionary: build one for each request, or as many as you like. The session is in the
    store; what this node holds of it while requests run is shared by all that are built here.

    Args:
        manager: Runs in this process (`async with manager.run()`).
        existing_session_id: Of a session that some node opened. Nothing is loaded yet: each request is checked when
            it comes, and answered as the manager would: 404 for what is no live session of that principal. Without
            one it is a new session under a new `id`, which exists once the `initialize` given to it has succeeded.
    """

    def __init__(self, manager: SessionManager, *, existing_session_id: str | None = None) -> None:
        self._manager = manager
        self._is_new = existing_session_id is None
        self.id = manager.endpoint.new_session_id() if existing_session_id is None else existing_session_id
        self.record: Record | None = None
        """What was known of the session when `hydrate` loaded it."""

    @classmethod
    async def hydrate(cls, session_id: str, *, manager: SessionManager, scope: Scope | None = None) -> Self:
        """The transport of a stored session, with its `record`: one round trip, in which its expiry is renewed (P2).

        Args:
            session_id: As the client sent it. Anything may come from there.
            scope: Of the request that it is for. Its principal has to be the session's; without a scope the session
                has to be one that was opened without authentication.

        Raises:
            SessionNotFound: The id is malformed, or the session is unknown, expired, ended, or another principal's.
                Answer all of them with the same 404.
            StoreUnavailable: Answer 503 with Retry-After, never 404: that would end the session for the client (P9).
            NotRunning: The manager does not run in this process.
        """
        loaded = await manager.load(manager.endpoint.key(session_id))
        record = Record.from_fields(loaded.fields)
        if record.principal != (b"" if scope is None else principal_of(scope)):
            raise SessionNotFound
        session = cls(manager, existing_session_id=session_id)
        session.record = record
        return session

    async def handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one HTTP request of this session: POST, GET or DELETE, with the session's id in its headers.

        Another id there is answered with 404, none with 400, except for the `initialize` of a new session.
        """
        await self._manager.handle_request({**scope, TRANSPORT: self}, receive, send)

    def check(self, session_id: str | None) -> None:
        """Whether a request with this id in its headers may be served here.

        Raises:
            SessionNotFound: It is another session's.
        """
        if session_id is not None and session_id != self.id:
            raise SessionNotFound

    def open(self) -> str:
        """The id that an `initialize` without one opens.

        Raises:
            Refusal: This session is open already: its requests carry its id.
        """
        if not self._is_new:
            raise Refusal(NO_ID)
        self._is_new = False
        return self.id
