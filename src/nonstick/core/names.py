"""Names that this node gives: session ids, and random names and numbers inside a store.

A session id is a bearer secret: it opens the session. The store and the logs only ever see its hash (P13). An id is
bound to its server: of several servers on one store each tells others' ids from its own by looking at them, and asks
the store for none of them (P1).

What is drawn for use inside a store must not repeat, and may be guessed. So it needs no system call. The generator is
our own: handlers may seed the module's, after which every request would draw the same names.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import random
import re
import secrets
from typing import Final

__all__ = [
    "UNNAMED",
    "identity",
    "is_session_id",
    "is_session_of",
    "new_attempt",
    "new_name",
    "new_session_id",
    "new_tag",
    "session_key",
]

_dice = random.Random()  # noqa: S311
if hasattr(os, "register_at_fork"):
    # A server that loads the app and then forks would have all its workers draw the same.
    os.register_at_fork(after_in_child=_dice.seed)


def new_attempt() -> int:
    """1 to 2 ** 50: the first attempt at a stream. Should the store lose the stream, another one may take its name."""
    return _dice.getrandbits(50) + 1


def new_name() -> str:
    """16 hexadecimal digits: the name of a writer, or of a turn."""
    return f"{_dice.getrandbits(64):016x}"


def new_tag() -> bytes:
    """8 bytes: an event's tag."""
    return _dice.randbytes(8)


_RANDOM: Final = 32
"""Characters of a session id that are random: 192 bits. Version 0.1 gave ids that are no more than that."""


_SHAPE: Final = re.compile(r"[A-Za-z0-9_-]{32}(?:[A-Za-z0-9_-]{8})?")


UNNAMED: Final = (
    "this %s server has no name, and by its name and path its sessions are told from those of other servers on the "
    "same store. Give it one when it is made, or namespace= to nonstick"
)
"""Warns of two such servers on one store, which would serve each other's sessions."""


def identity(*parts: str) -> str:
    """A name, of 32 characters, for what these parts name together. Other parts give another name."""
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
