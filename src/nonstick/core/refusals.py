"""What a client is told where its request is refused, or ends without its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mcp_types import INTERNAL_ERROR, INVALID_REQUEST, ErrorData

__all__ = [
    "ANSWER_UNREAD",
    "IN_DOUBT",
    "NODE_LOST",
    "NOT_REBUILT",
    "NOT_STARTED",
    "SESSION_ENDED",
    "SESSION_LOST",
    "SHUT_DOWN",
    "STORE_AWAY",
    "STREAM_LOST",
    "Failure",
    "Refusal",
    "missing_id",
    "shutting_down",
    "unavailable",
    "unknown_event_id",
]

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

SHUT_DOWN: Final = ErrorData(
    code=INTERNAL_ERROR,
    message="The server node that ran this request was shut down before it finished",
    data={"reason": "node_shut_down", "retrySafe": False},
)

SESSION_ENDED: Final = ErrorData(code=INTERNAL_ERROR, message="The session ended before the request did")

IN_DOUBT: Final = ErrorData(
    code=INTERNAL_ERROR,
    message="It is not known whether the request was run: the session store could not be reached",
    data={"reason": "store_unavailable", "retrySafe": False},
)

ANSWER_UNREAD: Final = ErrorData(
    code=INTERNAL_ERROR,
    message="The answer of the node that runs this request could not be read",
    data={"reason": "answer_unread", "retrySafe": False},
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why streams end that no node runs any more."""

    message: str
    reason: str

    def error(self, *, retry_safe: bool) -> ErrorData:
        """What the client is told; `retry_safe`: it may make the request again."""
        data = {"reason": self.reason, "retrySafe": retry_safe}
        return ErrorData(code=INTERNAL_ERROR, message=self.message, data=data)


NODE_LOST: Final = Failure("The server node that ran this request was lost before it finished", "node_lost")

SESSION_LOST: Final = Failure(
    "The server node that held this session is gone, and the session with it: open a new one with initialize",
    "session_lost",
)

NOT_REBUILT: Final = Failure(
    "The server node that held this session is gone, and the session could not be built anew on another one",
    "session_not_rebuilt",
)

NOT_STARTED: Final = Failure(
    "The server node that holds this session could not start the request", "request_not_started"
)
