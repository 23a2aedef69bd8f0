"""JSON-RPC messages: their bodies, and how long what a client names in them may be (P10)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Final

import pydantic_core
from mcp.shared.dispatcher import coerce_request_id
from mcp.shared.jsonrpc_dispatcher import progress_token_from_params
from mcp_types import (
    ErrorData,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    RequestId,
)

from nonstick.core.refusals import TOO_LONG, Refusal

__all__ = [
    "LONGEST_ID",
    "LONGEST_METHOD",
    "MAX_DEPTH",
    "as_number",
    "check_names",
    "error_body",
    "json_depth_exceeds",
    "notification_body",
    "request_body",
    "request_key",
    "result_body",
]

LONGEST_ID: Final = 1024
"""Characters of a request id or a progress token: the log and each of a stream's messages repeat them."""


LONGEST_METHOD: Final = 256
"""Characters of a method: it is logged, and kept with a stream."""


_LARGEST_NUMBER: Final = 2**63
"""Beyond any number that a client counts its requests with."""


MAX_DEPTH: Final = 64
"""Levels of nesting that a message may have."""


_LONGEST_KEY: Final = 64


def result_body(request_id: RequestId, result: Mapping[str, Any]) -> bytes:
    """A JSON-RPC response with this result.

    Raises:
        pydantic_core.PydanticSerializationError: The result holds what JSON cannot.
    """
    return pydantic_core.to_json({"jsonrpc": "2.0", "id": request_id, "result": result}, inf_nan_mode="null")


def error_body(request_id: RequestId | None, error: ErrorData) -> bytes:
    """A JSON-RPC error response. What of it JSON cannot hold is replaced or left out, and the rest told (P16)."""
    try:
        return _error_json(request_id, error)
    except Exception:
        readable = str.encode(error.message, errors="replace").decode()
    try:
        return _error_json(request_id, ErrorData(code=error.code, message=readable, data=error.data))
    except Exception:
        return _error_json(request_id, ErrorData(code=error.code, message=readable))


def _error_json(request_id: RequestId | None, error: ErrorData) -> bytes:
    return (
        JSONRPCError(jsonrpc="2.0", id=request_id, error=error)
        .model_dump_json(by_alias=True, exclude_unset=True)
        .encode()
    )


def request_body(request_id: RequestId, method: str, params: Mapping[str, Any] | None) -> bytes:
    """A JSON-RPC request."""
    message = {"jsonrpc": "2.0", "id": request_id, "method": method}
    return pydantic_core.to_json(message if not params else message | {"params": params}, inf_nan_mode="null")


def notification_body(method: str, params: Mapping[str, Any] | None) -> bytes:
    """A JSON-RPC notification."""
    message = {"jsonrpc": "2.0", "method": method}
    return pydantic_core.to_json(message if params is None else message | {"params": params}, inf_nan_mode="null")


def request_key(request_id: RequestId) -> str:
    """What correlates a request with what names it: 7 and "7" are one request (as in the SDK).

    At most 64 characters, because records keep these keys (P10): a longer id goes by its hash.
    """
    key = str(coerce_request_id(request_id))
    return key if len(key) <= _LONGEST_KEY else hashlib.sha256(key.encode()).hexdigest()


def as_number(value: object) -> float | None:
    """This JSON value as a finite float; None if it is no number, or an integer that is too large for one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def check_names(message: JSONRPCMessage) -> None:
    """Returns if this message's method, id and progress token are short enough to be kept.

    Raises:
        Refusal: One is too long.
    """
    if not isinstance(message, JSONRPCRequest | JSONRPCNotification):
        return
    if len(message.method) > LONGEST_METHOD:
        raise _too_long("method", f"{LONGEST_METHOD} characters")
    if isinstance(message, JSONRPCRequest):
        _check_id("request id", message.id)
        _check_id("progress token", progress_token_from_params(message.params))


def _check_id(what: str, value: str | int | None) -> None:
    if isinstance(value, str) and len(value) > LONGEST_ID:
        raise _too_long(what, f"{LONGEST_ID} characters")
    if isinstance(value, int) and abs(value) >= _LARGEST_NUMBER:
        raise _too_long(what, "63 bits")


def _too_long(what: str, limit: str) -> Refusal:
    return Refusal(TOO_LONG, what=what, limit=limit)


def json_depth_exceeds(value: Any, limit: int) -> bool:
    """Whether lists and objects in this parsed JSON are nested in more than `limit` levels."""
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not inner:
            return False
        level = inner
    return any(isinstance(item, dict | list) for item in level)
