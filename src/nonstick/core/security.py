"""Who may use a session, and what of it may be seen.

A session id is a bearer secret: it opens the session. The store and the logs only ever see its hash (P13).

An id is bound to its server: of several servers on one store each tells others' ids from its own by looking at them,
and asks the store for none of them (P1).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
from typing import Any, Final

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser, authorization_context
from starlette.types import Scope

__all__ = [
    "MAX_DEPTH",
    "UNNAMED",
    "identity",
    "is_session_id",
    "is_session_of",
    "json_depth_exceeds",
    "new_session_id",
    "principal_group",
    "principal_of",
    "session_key",
]

_RANDOM: Final = 32
"""Characters of a session id that are random: 192 bits. Version 0.1 gave ids that are no more than that."""

_SHAPE: Final = re.compile(r"[A-Za-z0-9_-]{32}(?:[A-Za-z0-9_-]{8})?")

MAX_DEPTH: Final = 64
"""Levels of nesting that a message may have."""

UNNAMED: Final = (
    "this %s server has no name, and by its name and path its sessions are told from those of other servers on the "
    "same store. Give it one when it is made, or namespace= to nonstick"
)
"""Warns of two such servers on one store, which would serve each other's sessions."""


def identity(*parts: str) -> str:
    """A name, of 32 characters, for what these parts name together, and nothing else is named by."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def new_session_id(server: str = "") -> str:
    """A new session id of this server: 192 random bits, then what binds them to it; 40 visible ASCII characters (P1).

    Args:
        server: Its `identity`.
    """
    secret = secrets.token_urlsafe(24)
    return secret + _binding(secret, server)


def is_session_id(text: str) -> bool:
    """Whether this could be the id of a session of some server."""
    return _SHAPE.fullmatch(text) is not None


def is_session_of(server: str, text: str) -> bool:
    """Whether this could be the id of a session of this server. Anything else is 404 unread (P1).

    An id that version 0.1 gave does not tell (P12).
    """
    if not is_session_id(text):
        return False
    return len(text) == _RANDOM or hmac.compare_digest(text[_RANDOM:], _binding(text[:_RANDOM], server))


def _binding(secret: str, server: str) -> str:
    digest = hashlib.blake2b(secret.encode(), key=server.encode(), digest_size=6, person=b"nonstick-server").digest()
    return base64.urlsafe_b64encode(digest).decode()


def session_key(session_id: str) -> str:
    """The name of this session in the store and, shortened, in the logs."""
    return hashlib.sha256(session_id.encode()).hexdigest()[:40]


def principal_of(scope: Scope) -> bytes:
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


def json_depth_exceeds(value: Any, limit: int) -> bool:
    """Whether lists and objects in this parsed JSON are nested in more than `limit` levels."""
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not inner:
            return False
        level = inner
    return any(isinstance(item, dict | list) for item in level)
