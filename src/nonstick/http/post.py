"""POST: `initialize`, requests, notifications and replies of clients that have sessions."""

from __future__ import annotations

from contextvars import Context, copy_context
from functools import partial
from typing import Any, Final

import pydantic_core
from mcp.shared.jsonrpc_dispatcher import cancelled_request_id_from_params, progress_token_from_params
from mcp_types import (
    DEFAULT_NEGOTIATED_VERSION,
    INVALID_PARAMS,
    INVALID_REQUEST,
    ErrorData,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
)
from starlette.requests import Request
from starlette.types import Send

from nonstick.core.jsonrpc import as_number, error_body, request_key
from nonstick.core.owners import HERE
from nonstick.core.principals import principal_of
from nonstick.core.record import CONFIRMED
from nonstick.core.refusals import (
    CANCELLED_BY_CLIENT,
    ID_IN_USE,
    INITIALIZE_TOO_LONG,
    NO_ID,
    SHUTTING_DOWN,
    TOO_MANY_NOTICES,
    TOO_MANY_REQUESTS,
    Refusal,
)
from nonstick.http.endpoint import Endpoint
from nonstick.http.get import serve_reader
from nonstick.http.intake import TRANSPORT, Routed, client_gone
from nonstick.http.respond import JSON_TYPE, respond, send_body, session_header
from nonstick.log.trim import Hold
from nonstick.node.node import Node
from nonstick.node.relay import Relay, packed, relay_notice
from nonstick.session import portable, tracing
from nonstick.session.cancels import send_cancel
from nonstick.session.exchange import Exchange
from nonstick.session.kernel import handle_notification
from nonstick.session.live import BeforeOpen, LiveSession
from nonstick.session.opening import Opening
from nonstick.store import Batch, Loaded

__all__ = ["PATIENCE_FOR_WHAT_COMES_ONCE", "serve_initialize", "serve_message"]

PATIENCE_FOR_WHAT_COMES_ONCE: Final = 5.0
"""Seconds of patience with the store for notifications and replies: no client repeats one that got 503 (P9)."""

_OFTEN: Final = ("notifications/progress", "notifications/cancelled")
"""Notifications that concern only the request that they name, unless the server has a handler for them."""

_LONGEST_URI: Final = 2048
"""Characters of a resource's URI that a record keeps."""


async def serve_initialize(
    node: Node, endpoint: Endpoint, message: JSONRPCMessage, request: Request, send: Send
) -> None:
    """Serves a message without a session id, which `initialize` alone may be.

    Raises:
        Refusal: The message is another one, or there is no room.
    """
    if not (isinstance(message, JSONRPCRequest) and message.method == "initialize"):
        raise Refusal(NO_ID)
    principal = principal_of(request.scope)
    node.services.requests.check(principal)
    _check_initialize(message, node.services.settings.max_initialize_bytes)
    routed: Routed | None = request.scope.get(TRANSPORT)
    session_id = endpoint.new_session_id() if routed is None else routed.open()
    session = LiveSession(node.services, session_id, endpoint.key(session_id))
    session.opening = BeforeOpen()
    if node.services.settings.placement == "owner":
        session.keep_anything()
    opening = Opening(
        session,
        message,
        request,
        protocol_version=str((message.params or {}).get("protocolVersion", DEFAULT_NEGOTIATED_VERSION)),
        principal=principal,
        gone=partial(client_gone, request),
    )
    opening.start(copy_context())
    with opening.answer as answer:
        outcome = await answer.outcome
        names_session = opening.is_visible and not isinstance(outcome, Refusal)
        await respond(send, outcome, [session_header(session_id)] if names_session else [])


async def serve_message(
    node: Node,
    session: LiveSession,
    message: JSONRPCMessage,
    request: Request,
    loaded: Loaded,
    send: Send,
    headers: list[tuple[bytes, bytes]],
) -> None:
    """Serves one message of a session: a request with its answer, a notification or a reply with 202.

    Raises:
        Refusal: The message is not admitted.
        SessionNotFound, StoreUnavailable: As the store's methods.
    """
    with session:
        if isinstance(message, JSONRPCRequest):
            await _serve_request(node, session, message, request, loaded, send, headers)
            return
        if isinstance(message, JSONRPCNotification):
            await _take_notification(session, message)
            await _handle_notification(node, session, message, request, loaded)
        else:
            await _take_response(session, message)
        await send_body(send, 202, b"", [*headers, JSON_TYPE])


async def _handle_notification(
    node: Node, session: LiveSession, message: JSONRPCNotification, request: Request, loaded: Loaded
) -> None:
    """Has the server's handler run, here or where the session is held."""
    if node.placement.where(session, loaded) is not HERE:
        if message.method not in _OFTEN or session.runner.heeds(message.method):
            await relay_notice(session, message, request, patience=PATIENCE_FOR_WHAT_COMES_ONCE)
        return
    if len(session.notices) >= session.services.settings.max_streams:
        raise Refusal(TOO_MANY_NOTICES)
    if session.record.principal:
        session.services.requests.check_share(session.record.principal)
    request, context = _as_relayed(session, request)
    # In the background: the client waits for no handler of a notification (as the SDK).
    session.spawn_notice(handle_notification(session, message, request), request, context)


async def _serve_request(
    node: Node,
    session: LiveSession,
    message: JSONRPCRequest,
    request: Request,
    loaded: Loaded,
    send: Send,
    headers: list[tuple[bytes, bytes]],
) -> None:
    settings = session.services.settings
    if session.services.drain.is_closing:
        raise Refusal(SHUTTING_DOWN)
    where = node.placement.where(session, loaded)
    relayed = node.placement.relayed.get(session.key, ())
    key = request_key(message.id)
    if key in session.exchanges or key in relayed:
        raise Refusal(ID_IN_USE)
    if len(session.exchanges) + len(relayed) >= settings.max_streams:
        raise Refusal(TOO_MANY_REQUESTS)
    if key in loaded.cancels:
        # The request was overtaken by its own cancel (P5). The cancel is used up: a later request of that id may run.
        session.services.tasks.spawn(session.services.store.append(session.key, Batch([], uncancel=key)))
        error = CANCELLED_BY_CLIENT
        await send_body(send, 200, error_body(message.id, error), [*headers, JSON_TYPE])
        return
    if message.method == "resources/subscribe" and (no_room := _refuse_subscription(session, message.params)):
        await send_body(send, 200, error_body(message.id, no_room), [*headers, JSON_TYPE])
        return
    if message.method == "initialize":
        _check_initialize(message, settings.max_initialize_bytes)
        version = str((message.params or {}).get("protocolVersion", DEFAULT_NEGOTIATED_VERSION))
    else:
        version = session.record.protocol_version
    if where is not HERE:
        relay = Relay(session, message, request, owner=where, since=loaded.head, version=version)
        with (
            node.placement.relaying(session.key, key),
            session.services.requests.hold(request, session.record.principal),
        ):
            await serve_reader(relay, request.receive, send, headers)
        return
    hold = await _room_in_log(session, message)
    if hold is not None and key in session.exchanges:
        hold.release()
        raise Refusal(ID_IN_USE)
    gone = partial(client_gone, request)
    request, context = _as_relayed(session, request)
    exchange = Exchange(session, message, request, head=loaded.head, protocol_version=version, gone=gone, hold=hold)
    exchange.start(context)
    with exchange.answer as answer:
        await respond(send, await answer.outcome, headers)


async def _room_in_log(session: LiveSession, message: JSONRPCRequest) -> Hold | None:
    """Room for a request that the log is to keep whole once it streams, so that another node may run it again.

    Raises:
        Refusal: There is none.
    """
    if session.services.settings.reexecute == "never" or message.method == "initialize":
        return None
    return await session.log.trimmer.hold(len(pydantic_core.to_json(message.params)))


def _check_initialize(message: JSONRPCRequest, limit: int) -> None:
    if len(pydantic_core.to_json(message.params)) > limit:
        raise Refusal(INITIALIZE_TOO_LONG, limit=limit)


def _refuse_subscription(session: LiveSession, params: dict[str, Any] | None) -> ErrorData | None:
    """The error for a subscription that the session's record has no room for (P10)."""
    uri = str((params or {}).get("uri", ""))
    if len(uri) > _LONGEST_URI:
        return ErrorData(code=INVALID_PARAMS, message=f"The URI is longer than {_LONGEST_URI} characters")
    limit = session.services.settings.max_subscriptions
    if uri in session.record.subscriptions or len(session.record.subscriptions) < limit:
        return None
    return ErrorData(
        code=INVALID_REQUEST,
        message=f"This session is subscribed to {limit} resources already; unsubscribe from some first",
    )


async def _take_notification(session: LiveSession, message: JSONRPCNotification) -> None:
    """What a notification means to the session, before it is acknowledged."""
    params = message.params or {}
    match message.method:
        case "notifications/initialized" if not session.connection.initialized.is_set():
            changes: dict[str, bytes | None] = {"initialized": b"1"}
            lifetime = None
            if session.record.unconfirmed:
                changes |= CONFIRMED
                lifetime = session.services.settings.lifetime
            await session.services.store.update(
                session.key, changes, lifetime=lifetime, patience=PATIENCE_FOR_WHAT_COMES_ONCE
            )
            session.note(unconfirmed=False)
        case "notifications/cancelled":
            request_id = cancelled_request_id_from_params(params)
            if request_id is not None:
                await send_cancel(
                    session.exchanges, session.log, request_id, params, patience=PATIENCE_FOR_WHAT_COMES_ONCE
                )
        case "notifications/progress":
            token = progress_token_from_params({"_meta": params})
            if token is not None and as_number(params.get("progress")) is not None:
                await session.backchannel.take_progress(token, params, patience=PATIENCE_FOR_WHAT_COMES_ONCE)
        case _:
            pass


async def _take_response(session: LiveSession, message: JSONRPCResponse | JSONRPCError) -> None:
    if message.id is None:
        return
    body = message.model_dump_json(by_alias=True, exclude_unset=True).encode()
    await session.backchannel.take_reply(message.id, body, patience=PATIENCE_FOR_WHAT_COMES_ONCE)


def _as_relayed(session: LiveSession, request: Request) -> tuple[Request, Context]:
    """The request, and the context of its handler. Where this node holds the session, both are as if relayed here."""
    if session.pin is None:
        return request, copy_context()
    request = portable.unpack(packed(session, request), session.id)
    return request, portable.context_of(request, tracing.here())
