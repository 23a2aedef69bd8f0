"""What a client is told of whatever a handler raised."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from mcp.shared.exceptions import MCPError
from mcp_types import INTERNAL_ERROR, INVALID_PARAMS, ErrorData
from pydantic import BaseModel, ValidationError

from nonstick.core.jsonrpc import error_body
from nonstick.session import ending


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Rude(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


class Mutilated(MCPError):
    """Whose constructor did not run."""

    def __init__(self) -> None:
        pass


class Number(BaseModel):
    number: int


def invalid() -> ValidationError:
    with pytest.raises(ValidationError) as raised:
        Number.model_validate({"number": "secret"})
    return raised.value


@pytest.mark.parametrize(
    ("exception", "code", "message"),
    [
        (ValueError("boom"), 0, "boom"),
        (MCPError(7, "seven"), 7, "seven"),
        (invalid(), INVALID_PARAMS, "Invalid request parameters"),
        (Mute(), 0, "The handler raised an exception that cannot be shown"),
        (Rude(), 0, "The handler raised an exception that cannot be shown"),
        (Mutilated(), 0, "The handler raised an exception that cannot be shown"),
        (asyncio.CancelledError("secret"), INTERNAL_ERROR, ending.CANCELLED.message),
        (GeneratorExit("secret"), INTERNAL_ERROR, ending.INTERRUPTED.message),
        (BaseExceptionGroup("secret", [GeneratorExit()]), INTERNAL_ERROR, ending.INTERRUPTED.message),
        (SystemExit("secret"), INTERNAL_ERROR, ending.EXITING.message),
        (KeyboardInterrupt(), INTERNAL_ERROR, ending.EXITING.message),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_exception_is_a_fitting_error(exception: BaseException, code: int, message: str) -> None:
    """P16: the SDK's where that has one; of what was not meant for clients nothing."""
    error = ending.error_of(exception)
    assert (error.code, error.message) == (code, message)
    assert "secret" not in error_body(1, error).decode()


@pytest.mark.parametrize(
    ("message", "data", "shown"),
    [
        ("plain", {"a": 1}, {"code": 1, "message": "plain", "data": {"a": 1}}),
        ("s\ud800", {"a": 1}, {"code": 1, "message": "s?", "data": {"a": 1}}),
        ("plain", object(), {"code": 1, "message": "plain"}),
        ("s\ud800", {"a": "\udfff"}, {"code": 1, "message": "s?"}),
    ],
)
def test_unserialisable_error_is_told_as_possible(message: str, data: Any, shown: dict[str, Any]) -> None:
    """P16."""
    body = json.loads(error_body("id", ErrorData(code=1, message=message, data=data)))
    assert body == {"jsonrpc": "2.0", "id": "id", "error": shown}
