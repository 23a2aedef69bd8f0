"""GET: the rest of a request's stream, or the standalone stream."""

from __future__ import annotations

from mcp.server.streamable_http import LAST_EVENT_ID_HEADER
from starlette.requests import Request
from starlette.types import Receive, Send

from nonstick.core.event_ids import EventId, parse_event_id
from nonstick.core.refusals import SHUTTING_DOWN, UNKNOWN_EVENT_ID, Refusal
from nonstick.http.respond import respond
from nonstick.node.node import Node
from nonstick.session.live import LiveSession
from nonstick.session.reader import Reader
from nonstick.session.resumption import Resumption
from nonstick.session.standalone import StandaloneConnection
from nonstick.store import STANDALONE
from nonstick.waiting.deadline import Deadline

__all__ = ["serve_reader", "serve_stream"]


async def serve_stream(
    session: LiveSession,
    node: Node,
    request: Request,
    receive: Receive,
    send: Send,
    headers: list[tuple[bytes, bytes]],
) -> None:
    """Serves one GET: resumes the stream that its event id names, or else connects to the standalone stream.

    Raises:
        Refusal: The event id is none of this session's, or no slot is left.
        SessionNotFound, StoreUnavailable: As `Store.read`, before the response has begun.
    """
    with session:
        text = request.headers.get(LAST_EVENT_ID_HEADER)
        place = parse_event_id(text, session.id) if text else None
        if text and place is None:
            raise Refusal(UNKNOWN_EVENT_ID)
        resumes = place is not None and place.stream != STANDALONE
        quota = node.session_resumptions if resumes else node.session_listeners
        with quota.hold(session.key), node.listeners.hold(request, session.record.principal):
            reader = await _prepared(session, place)
            await serve_reader(reader, receive, send, headers)


async def serve_reader(reader: Reader, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
    """Responds with what is read, for as long as the client is there."""
    try:
        await respond(send, await reader.begin(receive), headers)
    finally:
        await reader.end()


async def _prepared(session: LiveSession, place: EventId | None) -> Reader:
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


async def _reader(session: LiveSession, place: EventId | None) -> Reader:
    if place is not None and place.stream != STANDALONE:
        reader: Reader = Resumption(session, place)
    else:
        reader = StandaloneConnection(session, place)
    await reader.prepare()
    return reader
