"""Principals: who sends a request, and so whose session it opens or may use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser, authorization_context

__all__ = ["principal_group", "principal_of"]


def principal_of(scope: Mapping[str, Any]) -> bytes:
    """Who sends this request: client id, issuer and subject as JSON; empty without authentication.

    Not the token: a refreshed token of the same principal keeps the session.
    """
    user = scope.get("user")
    if not isinstance(user, AuthenticatedUser):
        return b""
    return json.dumps(authorization_context(user), sort_keys=True).encode()


def principal_group(principal: bytes) -> str:
    """The name under which the sessions of this principal are counted in the store (P10, P13)."""
    return "principal:" + hashlib.sha256(principal).hexdigest()[:32]
