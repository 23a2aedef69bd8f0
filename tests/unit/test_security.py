"""Session ids, keys, principals, and how deep JSON may go."""

from __future__ import annotations

import string
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from starlette.authentication import SimpleUser

from nonstick.core.jsonrpc import json_depth_exceeds
from nonstick.core.names import identity, is_session_id, is_session_of, new_session_id, session_key
from nonstick.core.principals import principal_of
from nonstick.errors import without_text

SHOP, BANK = identity("shop", "/mcp"), identity("bank", "/mcp")


def test_new_ids_differ_and_name_server() -> None:
    """P1: 192 bits."""
    ids = {new_session_id(SHOP) for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len({one[at] for one in ids}) > 30 for at in range(32))
    assert all(is_session_of(SHOP, one) and len(one) == 40 for one in ids)
    assert not any(is_session_of(other, one) for one in ids for other in (BANK, ""))


@given(st.text(string.ascii_letters + string.digits + "-_.é", min_size=30, max_size=42))
def test_ids_have_their_length_and_alphabet(text: str) -> None:
    """P1: 32 or 40 characters, of those for URLs."""
    allowed = set(string.ascii_letters + string.digits + "-_")
    assert is_session_id(text) == (len(text) in (32, 40) and set(text) <= allowed)


@given(st.text(string.ascii_letters + string.digits + "-_", min_size=32, max_size=32))
def test_old_version_id_fits_any_server(text: str) -> None:
    """P12: it is of any, for one release."""
    assert is_session_of(SHOP, text)
    assert is_session_of(BANK, text)


@pytest.mark.parametrize(
    "text", ["a" * 32 + "\n", "a" * 31, "a" * 33, "ａ" * 32, "a" * 31 + "\0", "", "a" * 40, "a" * 64]
)
def test_look_alikes_are_no_ids(text: str) -> None:
    assert not is_session_of(SHOP, text)


def test_changed_id_fits_no_server() -> None:
    """P1: nor is one with something after it, as the name of an endpoint was once."""
    session_id = new_session_id(SHOP)
    for at in (0, 15, 31, 32, 39):
        changed = session_id[:at] + ("a" if session_id[at] != "a" else "b") + session_id[at + 1 :]
        assert not is_session_of(SHOP, changed)
    assert not is_session_of(SHOP, session_id + "localhost")
    assert not is_session_of(SHOP, session_id[:-1])


@given(st.lists(st.text(max_size=5), max_size=4), st.lists(st.text(max_size=5), max_size=4))
def test_identity_keeps_its_parts_apart(one: list[str], other: list[str]) -> None:
    """However they are joined."""
    assert (identity(*one) == identity(*other)) == (one == other)


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
