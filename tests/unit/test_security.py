"""Session ids, keys, principals, and how deep JSON may go."""

from __future__ import annotations

import string
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from starlette.authentication import SimpleUser

from nonstick.security import (
    json_depth_exceeds,
    new_session_id,
    principal_of,
    session_key,
    valid_session_id,
    without_text,
)


def test_new_ids_are_valid_and_differ() -> None:
    """P1: 192 bits."""
    ids = {new_session_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(valid_session_id(one) and len(one) == 32 for one in ids)


@given(st.text(max_size=80))
def test_valid_ids_are_22_to_64_of_the_url_alphabet(text: str) -> None:
    """P1."""
    allowed = set(string.ascii_letters + string.digits + "-_")
    assert valid_session_id(text) == (22 <= len(text) <= 64 and set(text) <= allowed)


@pytest.mark.parametrize("text", ["a" * 22 + "\n", "a" * 21, "a" * 65, "ａ" * 32, "a" * 31 + "\0", ""])
def test_look_alikes_are_no_ids(text: str) -> None:
    assert not valid_session_id(text)


def test_key_does_not_show_the_id() -> None:
    """P13: visible ASCII, at most 64 characters, the same everywhere."""
    session_id = new_session_id()
    key = session_key(session_id)
    assert key == session_key(session_id) != session_key(new_session_id())
    assert key.isalnum()
    assert len(key) <= 64
    assert session_id not in key


def user(**more: Any) -> dict[str, Any]:
    return {"user": AuthenticatedUser(AccessToken(**{"token": "t", "client_id": "c", "scopes": [], **more}))}


def test_principal_is_client_issuer_and_subject() -> None:
    """P2."""
    mine = principal_of(user(subject="ada", claims={"iss": "one"}))
    assert mine == principal_of(user(subject="ada", claims={"iss": "one", "exp": 7}, token="refreshed", scopes=["x"]))
    others = [
        user(subject="bob", claims={"iss": "one"}),
        user(subject="ada", claims={"iss": "two"}),
        user(subject="ada"),
        user(claims={"iss": "one"}),
        user(client_id="d", subject="ada", claims={"iss": "one"}),
        # Parts that could be taken for one another.
        user(client_id='c", "issuer": "one', subject="ada"),
    ]
    assert len({mine, *map(principal_of, others)}) == len(others) + 1


def test_nobody_is_no_principal() -> None:
    assert principal_of({}) == b""
    assert principal_of({"user": SimpleUser("basic")}) == b""
    assert principal_of(user()) != b""


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(
    st.recursive(st.none(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=1), inner)),
    st.integers(0, 6),
)
def test_depth_is_levels_of_lists_and_objects(value: Any, limit: int) -> None:
    """P10."""
    assert json_depth_exceeds(value, limit) == (depth(value) > limit)


def test_very_deep_value_is_no_trouble() -> None:
    deep: Any = None
    for _ in range(100_000):
        deep = [deep]
    assert json_depth_exceeds(deep, 64)
    while deep:  # taken apart from outside: freeing it at once would recurse
        deep = deep[0]


def test_exception_is_shown_without_what_it_says() -> None:
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
