"""GET: the rest of a request's stream, or the standalone stream."""

from __future__ import annotations

from mcp.server.streamable_http import LAST_EVENT_ID_HEADER
from starlette.requests import Request
from starlette.types import Receive, Send

from nonstick.core.event_ids import EventId, parse_event_id
from nonstick.core.refusals import SHUTTING_DOWN, UNKNOWN_EVENT_ID, Refusal
from nonstick.session.live import Session
from nonstick.session.quotas import Quota
from nonstick.session.reader import Reader
from nonstick.session.resumption import Resumption
from nonstick.session.standalone import StandaloneConnection
from nonstick.store import STANDALONE
from nonstick.waiting.deadline import Deadline

__all__ = ["serve_stream"]


async def serve_stream(
    session: Session,
    listeners: Quota,
    request: Request,
    receive: Receive,
    send: Send,
    headers: list[tuple[bytes, bytes]],
) -> None:
    with session:
        text = request.headers.get(LAST_EVENT_ID_HEADER)
        place = parse_event_id(text, session.id) if text else None
        if text and place is None:
            raise Refusal(UNKNOWN_EVENT_ID)
        resumes = place is not None and place.stream != STANDALONE
        room = session.resumptions if resumes else session.listeners
        room.check()
        with room.hold(request), listeners.hold(request, session.principal):
            reader = await _prepared(session, place)
            await reader.serve(receive, send, headers)


async def _prepared(session: Session, place: EventId | None) -> Reader:
    """The reader, unless the node closes before it has read what it needs.

    Raises:
        Refusal, SessionNotFound, StoreUnavailable: As `_reader`; the client may come back, or go elsewhere.
    """
    deadline, until_closing = Deadline(None), session.services.drain.until_closing
    try:
        with deadline:
            until_closing[deadline] = None
            try:
                return await _reader(session, place)
            finally:
                del until_closing[deadline]
    except TimeoutError:
        raise Refusal(SHUTTING_DOWN) from None


async def _reader(session: Session, place: EventId | None) -> Reader:
    if place is not None and place.stream != STANDALONE:
        reader: Reader = Resumption(session, place)
    else:
        reader = StandaloneConnection(session, place)
    await reader.prepare()
    return reader
