"""What is logged of an exception."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest

from nonstick.errors import without_text


def test_exception_is_shown_without_text() -> None:
    """P13: its types, causes and places, and no text of it, which may quote a payload."""

    def fail() -> None:
        try:
            try:
                raise ValueError("payload")
            except ValueError as error:
                raise LookupError("payload") from error
        except LookupError as error:
            error.add_note("payload")
            raise ExceptionGroup("payload", [error]) from None

    with pytest.raises(ExceptionGroup) as raised:
        fail()
    shown = "".join(traceback.format_exception(without_text(raised.value)))
    assert all(said in shown for said in ("ValueError", "LookupError", "ExceptionGroup", "in fail", "direct cause"))
    assert "payload" not in "\n".join(
        line for line in shown.splitlines() if "raise " not in line and "note" not in line
    )


def _circle() -> BaseException:
    error = ValueError("secret")
    error.__cause__ = KeyError("secret")
    error.__cause__.__cause__ = error
    return error


def _chain() -> BaseException:
    error: BaseException = ValueError("secret")
    for _ in range(5000):
        outer = ValueError("secret")
        outer.__cause__ = error
        error = outer
    return error


def _nest() -> BaseException:
    error: Exception = ValueError("secret")
    for _ in range(500):
        error = ExceptionGroup("secret", [error] * 50)
    return error


class _Hostile(ExceptionGroup[ValueError]):
    def __getattribute__(self, name: str) -> Any:
        raise GeneratorExit


@pytest.mark.parametrize(
    "make", [_circle, _chain, _nest, lambda: _Hostile("secret", [ValueError()])], ids=["circle", "chain", "nest", "own"]
)
def test_logged_exception_has_an_end(make: Callable[[], BaseException]) -> None:
    """P13, P16: whatever its causes are, and whatever its class does when it is looked at."""
    lines = traceback.format_exception(without_text(make()))
    assert len(lines) < 2000
    assert "secret" not in "".join(lines)
