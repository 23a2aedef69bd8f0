"""What a client is told where its request is refused, or ends without its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mcp_types import INTERNAL_ERROR, INVALID_REQUEST, ErrorData

__all__ = ["STORE_AWAY", "STREAM_LOST", "Refusal", "missing_id", "shutting_down", "unavailable", "unknown_event_id"]

STORE_AWAY: Final = "the session store cannot be reached"
"""All that a client is told about it."""


@dataclass(slots=True)
class Refusal(Exception):
    """A request is refused: an HTTP status and a JSON-RPC error, which carries no request id.

    Attributes:
        status: HTTP status.
        message: What is wrong and, where it is not obvious, what to do. Never a session id or a payload.
        code: JSON-RPC error code.
        retry_after: Seconds for a `Retry-After` header.
        allow: Value of an `Allow` header.
        plain: The body is the message alone, with no type, as the SDK does it.
    """

    status: int
    message: str
    code: int = INVALID_REQUEST
    retry_after: int | None = None
    allow: str | None = None
    plain: bool = False


def unknown_event_id() -> Refusal:
    """There is no such place in this session's streams."""
    return Refusal(400, "Bad Request: Last-Event-ID is not an id that this session's streams sent")


def missing_id() -> Refusal:
    """400: only `initialize` needs no session id."""
    # Made anew each time: an exception that is raised twice keeps what the first one's frames held.
    return Refusal(400, "Bad Request: Missing session ID")


def unavailable(message: str) -> Refusal:
    """503: try again soon. The session is as it was (P9)."""
    return Refusal(503, message, INTERNAL_ERROR, retry_after=1)


def shutting_down() -> Refusal:
    """503: another node takes it."""
    return unavailable("This node is shutting down. Try again.")


STREAM_LOST: Final = ErrorData(
    code=INTERNAL_ERROR,
    message="The stream of this request is no longer in the session store; its outcome is not known",
    data={"reason": "stream_lost", "retrySafe": False},
)
