"""Whose a session is."""

from __future__ import annotations

from typing import Any

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from starlette.authentication import SimpleUser

from nonstick.core.principals import principal_of


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
