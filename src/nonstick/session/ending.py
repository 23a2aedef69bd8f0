"""How a handler ended, as its client is told: whatever it raised becomes one error, under its request's id (P16)."""

from __future__ import annotations

import asyncio
from typing import Final

from mcp.shared.jsonrpc_dispatcher import handler_exception_to_error_data
from mcp_types import INTERNAL_ERROR, ErrorData
from pydantic_core import PydanticSerializationError

from nonstick.core.refusals import Failure

__all__ = ["CANCELLED", "EXITING", "INTERRUPTED", "INVALID_RESULT", "UNTOLD", "error_of"]

_AS_THE_SDK: Final = 0
"""The code that the SDK gives, on this wire, to an exception that is not made for it."""


CANCELLED: Final = Failure("The handler of this request was cancelled on the server", "handler_cancelled").error(
    retry_safe=False
)
EXITING: Final = Failure("The server node stops: the handler of this request told it to", "server_exit").error(
    retry_safe=False
)
INTERRUPTED: Final = Failure("The handler of this request was interrupted on the server", "handler_interrupted").error(
    retry_safe=False
)
UNTOLD: Final = Failure("The request ran, but its outcome could not be told", "outcome_not_told").error(
    retry_safe=False
)
INVALID_RESULT: Final = ErrorData(code=INTERNAL_ERROR, message="Handler returned an invalid result")
_NO_TEXT: Final = ErrorData(code=_AS_THE_SDK, message="The handler raised an exception that cannot be shown")


def error_of(exception: BaseException) -> ErrorData:
    """What the client is told of this exception, as the SDK where that tells anything. Never raises."""
    try:
        if isinstance(exception, Exception):
            return _error_of(exception)
    except BaseException:
        # Its class has methods of its own, which may do anything.
        return _NO_TEXT
    if isinstance(exception, SystemExit | KeyboardInterrupt):
        return EXITING
    # Of these nobody expects that a client reads what they say.
    return CANCELLED if isinstance(exception, asyncio.CancelledError) else INTERRUPTED


def _error_of(exception: Exception) -> ErrorData:
    if isinstance(exception, PydanticSerializationError):
        return INVALID_RESULT
    error = handler_exception_to_error_data(exception)
    return ErrorData(code=_AS_THE_SDK, message=str(exception)) if error is None else error
