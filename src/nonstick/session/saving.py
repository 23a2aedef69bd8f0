"""What a request changes in its session, stored in one step with its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import pydantic_core
from mcp_types import INTERNAL_ERROR, ErrorData, JSONRPCRequest

from nonstick.core.event_ids import cursor_text
from nonstick.core.events import Kind, draft
from nonstick.core.jsonrpc import error_body
from nonstick.core.record import opening_fields, subscription_field
from nonstick.core.refusals import STATE_UNSAVED
from nonstick.errors import StateNotJSON, StateTooLarge, StoreUnavailable
from nonstick.session.answer import Answer
from nonstick.session.live import LiveSession
from nonstick.session.renewal import confirm
from nonstick.session.stream import Stream
from nonstick.store import Batch, Draft

__all__ = ["Saving"]

Fields = dict[str, bytes | None]
"""Of a session's record: to set, or with None to remove."""


class Change(NamedTuple):
    """What the protocol makes of a request that succeeded (P2).

    Attributes:
        fields: Of the session's record.
        news: What other nodes have to know at once: those that carry the session's streams.
    """

    fields: Fields
    news: list[Draft]


class Saving:
    """The answer to one request on its way out, behind what the request changed in its session.

    Attributes:
        body: The answer. It becomes an error if session state was changed that cannot be stored.
        failed: The answer is an error: the protocol makes nothing of the request.
    """

    def __init__(self, session: LiveSession, message: JSONRPCRequest, body: bytes, *, failed: bool) -> None:
        self._session = session
        self._message = message
        self.body = body
        self.failed = failed

    def state(self) -> Fields:
        """The session state to store. What of it cannot be stored is undone, and the answer becomes an error."""
        state = self._session.state
        try:
            return state.changes()
        except (StateNotJSON, StateTooLarge) as error:
            self.failed = True
            self.body = error_body(self._message.id, ErrorData(code=INTERNAL_ERROR, message=str(error)))
            return state.changes()

    async def give(self, answer: Answer, stream: Stream | None) -> None:
        """Stores the changes, and gives the answer: as the end of the stream, if there is one.

        Raises:
            SessionNotFound, StreamClosed, Fenced: The request's end is another's to tell.
        """
        if not self.state():
            await self._store_and_answer({}, answer, stream)
            return
        async with self._session.state.changing:
            # Looked up under the lock: what another request wrote before must not be undone.
            await self._store_and_answer(self.state(), answer, stream)

    async def _store_and_answer(self, state: Fields, answer: Answer, stream: Stream | None) -> None:
        """Stores this session state with all else that the request changed, and gives the answer."""
        session = self._session
        change = None
        if not self.failed and (change_of := _CHANGES.get(self._message.method)) is not None:
            change = change_of(session, self._message.params or {})
        fields, news = (state, []) if change is None else (state | change.fields, change.news)
        if stream is not None and (stream.position or stream.is_in_doubt):
            await stream.end(self.body, fields, news)
            self.failed |= stream.is_lost
        elif (fields or news) and not await self._store(fields, news):
            # Not 503, which says "try again": it would run twice.
            answer.give(error_body(self._message.id, STATE_UNSAVED))
            return
        else:
            answer.give(self.body)
        if state:
            session.state.saved(state)
        if (level := fields.get("level")) is not None:
            # Other requests that run here may not follow the log, which says so too.
            session.note(log_level=level.decode())
        if session.record.unconfirmed and not self.failed:
            confirm(session)

    async def _store(self, fields: Fields, news: list[Draft]) -> bool:
        """Stores the changes of a request that has no stream. False if nobody knows whether that was done."""
        session = self._session
        try:
            if news:
                await session.log.append(Batch(news, fields=fields))
            else:
                await session.services.store.update(session.key, fields)
        except StoreUnavailable:
            return False
        return True


def _introduced(session: LiveSession, _params: Mapping[str, Any]) -> Change:
    fields = opening_fields(*session.runner.handshake(), b"")
    return Change({name: fields[name] for name in ("protocol", "client")}, [])


def _level(_session: LiveSession, params: Mapping[str, Any]) -> Change:
    return _change({"level": str(params["level"]).encode()}, {"level": params["level"]})


def _subscribed(session: LiveSession, params: Mapping[str, Any]) -> Change:
    uri = str(params["uri"])
    # The client expects to hear what is broadcast from here on, however late a node learns of the subscription.
    heard = cursor_text(session.services.cluster_log.broadcasts.head)
    return _change({subscription_field(uri): uri.encode()}, {"subscribed": params["uri"], "heard": heard})


def _unsubscribed(_session: LiveSession, params: Mapping[str, Any]) -> Change:
    return _change({subscription_field(str(params["uri"])): None}, {"unsubscribed": params["uri"]})


def _change(fields: Fields, told: Mapping[str, Any]) -> Change:
    return Change(fields, [draft(Kind.CHANGED, pydantic_core.to_json(told))])


_CHANGES: Final[Mapping[str, Callable[[LiveSession, Mapping[str, Any]], Change]]] = {
    "initialize": _introduced,
    "logging/setLevel": _level,
    "resources/subscribe": _subscribed,
    "resources/unsubscribe": _unsubscribed,
}
"""What requests of the protocol change, by their method. All others change session state alone."""
