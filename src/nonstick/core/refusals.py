"""What a client is told where its request is refused, or ends without its answer.

Every refusal that nonstick gives is a row of the first table: HTTP status, text, JSON-RPC code, and when to come back.
The text says what is wrong and, where it is not obvious, what to do. Never a session id or a payload (P13). Where the
SDK refuses the same, the words are the SDK's.

404 says that there is no such session, which ends the session for its client. So what is only away is 503 (P9).

The second table is of errors under a request's id, for requests that were admitted. Their `data` says whether the
client may safely make the request again (`retrySafe`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from mcp.server.streamable_http import REQUEST_CANCELLED
from mcp_types import INTERNAL_ERROR, INVALID_PARAMS, INVALID_REQUEST, PARSE_ERROR, ErrorData

__all__ = [
    "ANSWER_UNREAD",
    "BODY_TOO_LARGE",
    "CANCELLED_BY_CLIENT",
    "FILLED_LOG",
    "HEAD_TOO_LARGE",
    "HOLDER_GONE",
    "ID_IN_USE",
    "INITIALIZE_TOO_LONG",
    "INTERRUPTED",
    "IN_DOUBT",
    "LOG_FULL",
    "NEVER_OPENED",
    "NODE_LOST",
    "NODE_RUNS_TOO_MANY",
    "NODE_STREAMS_TOO_MANY",
    "NOT_BOTH_ACCEPTED",
    "NOT_FOUND",
    "NOT_JSON",
    "NOT_JSON_ACCEPTED",
    "NOT_OPENED",
    "NOT_PARSED",
    "NOT_REBUILT",
    "NOT_RUN",
    "NOT_RUNNING",
    "NOT_RUN_HERE",
    "NOT_STARTED",
    "NOT_STORED",
    "NO_BATCHES",
    "NO_ID",
    "NO_MESSAGE",
    "NO_STREAM_ACCEPTED",
    "NO_SUCH_METHOD",
    "PRINCIPAL_RUNS_TOO_MANY",
    "PRINCIPAL_STREAMS_TOO_MANY",
    "SESSION_ENDED",
    "SESSION_LOST",
    "SHUTTING_DOWN",
    "SHUT_DOWN",
    "STATE_UNSAVED",
    "STORE_AWAY",
    "STORE_UNAVAILABLE",
    "STREAM_LOST",
    "TOO_DEEP",
    "TOO_LONG",
    "TOO_MANY_NOTICES",
    "TOO_MANY_REQUESTS",
    "TOO_MANY_RESUMED",
    "TOO_MANY_SESSIONS",
    "TOO_MANY_SESSIONS_OF_PRINCIPAL",
    "TOO_MANY_STREAMS",
    "TOO_SLOW",
    "UNKNOWN_EVENT_ID",
    "Failure",
    "Reason",
    "Refusal",
]

STORE_AWAY: Final = "the session store cannot be reached"
"""All that a client is told about it."""


class Reason(NamedTuple):
    """Why requests are refused.

    Attributes:
        status: HTTP status.
        message: In braces what a request's refusal fills in.
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


class Refusal(Exception):
    """A request is refused: an HTTP status and a JSON-RPC error, which carries no request id.

    Made anew each time: an exception that is raised twice keeps what the first one's frames held.

    Args:
        values: For what the reason's message has in braces.
    """

    def __init__(self, reason: Reason, /, **values: object) -> None:
        self.reason = reason
        self.message = reason.message.format(**values) if values else reason.message

    @property
    def error(self) -> ErrorData:
        """The JSON-RPC error."""
        return ErrorData(code=self.reason.code, message=self.message)


def _later(message: str, after: int = 1) -> Reason:
    """503: try again soon. The session is as it was (P9)."""
    return Reason(503, message, INTERNAL_ERROR, retry_after=after)


def _too_many(message: str, after: int = 1) -> Reason:
    """429: the client itself has too many."""
    return Reason(429, message, retry_after=after)


# ---- the request itself

NOT_JSON_ACCEPTED: Final = Reason(406, "Not Acceptable: Client must accept application/json")
NOT_BOTH_ACCEPTED: Final = Reason(406, "Not Acceptable: Client must accept both application/json and text/event-stream")
NO_STREAM_ACCEPTED: Final = Reason(406, "Not Acceptable: Client must accept text/event-stream")
NOT_JSON: Final = Reason(415, "Unsupported Media Type: Content-Type must be application/json")
NO_SUCH_METHOD: Final = Reason(405, "Method Not Allowed", allow="GET, POST, DELETE")
TOO_SLOW: Final = Reason(408, "Request Timeout: the request did not arrive within {seconds:g} s")
BODY_TOO_LARGE: Final = Reason(413, "Request body too large", plain=True)
HEAD_TOO_LARGE: Final = Reason(431, "Request Header Fields Too Large: the headers are longer than {limit} bytes")
NO_BATCHES: Final = Reason(
    400, "Validation error: JSON-RPC batches are not supported; send one message a request", INVALID_PARAMS
)
NOT_PARSED: Final = Reason(400, "Parse error: {error}", PARSE_ERROR)
TOO_DEEP: Final = Reason(400, "Parse error: nested in more than {limit} levels", PARSE_ERROR)
NO_MESSAGE: Final = Reason(
    400, "Validation error: the body must be one JSON-RPC 2.0 request, notification or response", INVALID_PARAMS
)
TOO_LONG: Final = Reason(400, "Bad Request: the {what} is longer than {limit}")
INITIALIZE_TOO_LONG: Final = Reason(400, "The parameters of initialize are longer than {limit} bytes", INVALID_PARAMS)

# ---- the session

NO_ID: Final = Reason(400, "Bad Request: Missing session ID")
"""Only `initialize` needs no session id."""
UNKNOWN_EVENT_ID: Final = Reason(400, "Bad Request: Last-Event-ID is not an id that this session's streams sent")
NOT_FOUND: Final = Reason(404, "Session not found")
HOLDER_GONE: Final = Reason(
    404, "Session not found: the server node that held it is gone. Open a new session with initialize"
)
ID_IN_USE: Final = Reason(409, "Conflict: a request with this id is still running in this session")

# ---- no room

TOO_MANY_REQUESTS: Final = _too_many("Too many requests of this session are running; wait for some")
TOO_MANY_NOTICES: Final = _too_many("Too many notifications of this session are being handled; wait for some")
TOO_MANY_STREAMS: Final = _too_many("Too many streams of this session are open; close one, or wait for one to end")
TOO_MANY_RESUMED: Final = _too_many("Too many streams of this session are being resumed; wait for one to end")
TOO_MANY_SESSIONS_OF_PRINCIPAL: Final = _too_many(
    "Too many sessions of this principal are open; end one with DELETE, or wait until one expires", after=10
)
PRINCIPAL_RUNS_TOO_MANY: Final = _too_many(
    "You have as many requests running on this node as one principal may; wait for some to end"
)
PRINCIPAL_STREAMS_TOO_MANY: Final = _too_many(
    "You have as many streams open on this node as one principal may; close one"
)
LOG_FULL: Final = _too_many(
    "The log of this session is full of requests that have not ended (max_log_bytes); wait for some to end"
)
TOO_MANY_SESSIONS: Final = _later("Too many open sessions", after=10)
NODE_RUNS_TOO_MANY: Final = _later("This node is running as many requests as it may; try again")
NODE_STREAMS_TOO_MANY: Final = _later("As many streams are open on this node as it may keep; try again")

# ---- try again

SHUTTING_DOWN: Final = _later("This node is shutting down. Try again.")
"""Another node takes it."""
NOT_RUN_HERE: Final = _later("This node was shut down before it ran the request. Try again.")
NOT_STORED: Final = _later("This node was shut down before the session could be stored. Try again.")
NOT_OPENED: Final = _later("The session could not be opened. Try again.")
STORE_UNAVAILABLE: Final = _later("The session store cannot be reached. The session is kept; try again.")

# ---- the server's own fault

INTERRUPTED: Final = Reason(500, "The request was interrupted", INTERNAL_ERROR)
NOT_RUNNING: Final = Reason(
    500,
    "nonstick is not running in this process: its lifespan was not entered. Run the app itself with an ASGI server, "
    "or, where it is mounted in another app, give the host its lifespan: FastAPI(lifespan=app.lifespan), or in the "
    "host's own lifespan: async with app.lifespan(): yield (for an app given to nonstick.adopt(): "
    "async with app.router.lifespan_context(app): yield)",
    INTERNAL_ERROR,
)
"""Also the text of `NotRunning`."""

# ---- errors under a request's id


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request ends without its answer."""

    message: str
    reason: str

    def error(self, *, retry_safe: bool) -> ErrorData:
        """What the client is told; `retry_safe`: it may make the request again."""
        data = {"reason": self.reason, "retrySafe": retry_safe}
        return ErrorData(code=INTERNAL_ERROR, message=self.message, data=data)


CANCELLED_BY_CLIENT: Final = ErrorData(code=REQUEST_CANCELLED, message="Request cancelled")

STREAM_LOST: Final = Failure(
    "The stream of this request is no longer in the session store; its outcome is not known", "stream_lost"
).error(retry_safe=False)

SHUT_DOWN: Final = Failure(
    "The server node that ran this request was shut down before it finished", "node_shut_down"
).error(retry_safe=False)

STATE_UNSAVED: Final = Failure(
    "The request ran, but the session store could not be reached to save what it changed in the session",
    "state_not_saved",
).error(retry_safe=False)

NOT_RUN: Final = Failure("The request was not run: the session store could not be reached", "store_unavailable").error(
    retry_safe=True
)

NEVER_OPENED: Final = ErrorData(code=INTERNAL_ERROR, message="The session took too long to open")

FILLED_LOG: Final = ErrorData(code=INTERNAL_ERROR, message="The session's log is full; the request was ended")

SESSION_ENDED: Final = ErrorData(code=INTERNAL_ERROR, message="The session ended before the request did")

IN_DOUBT: Final = Failure(
    "It is not known whether the request was run: the session store could not be reached", "store_unavailable"
).error(retry_safe=False)

ANSWER_UNREAD: Final = Failure(
    "The answer of the node that runs this request could not be read", "answer_unread"
).error(retry_safe=False)


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
