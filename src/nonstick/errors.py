"""One tree of errors.

Everything that nonstick raises on purpose is a `NonstickError`. The transport maps the store's errors to HTTP
once, in `manager.py`; nothing else decides a status.
"""

from __future__ import annotations

__all__ = [
    "AlreadyExists",
    "ConfigurationError",
    "Diverged",
    "Fenced",
    "NoSession",
    "NonstickError",
    "NotPending",
    "NotRunning",
    "SessionNotFound",
    "StateFull",
    "StateNotJSON",
    "StateTooLarge",
    "StoreError",
    "StoreUnavailable",
    "StoreUnusable",
    "StreamClosed",
    "TooManySessions",
    "Trimmed",
    "Undecryptable",
]


class NonstickError(Exception):
    """Base of every error that nonstick raises on purpose."""


class ConfigurationError(NonstickError, ValueError):
    """An argument, URL or environment that cannot work. The message names what to change."""


class NotRunning(NonstickError, RuntimeError):
    """A request arrived before `SessionManager.run()` was entered. The message shows the line to add."""


class NoSession(NonstickError, LookupError):
    """What needs a session was asked for outside of one. The message says where there is one."""


class StateNotJSON(NonstickError, TypeError):
    """A value put into session state cannot be stored as JSON, so no other node could load it."""


class StateTooLarge(NonstickError, ValueError):
    """A session's record has no room for this value (P10)."""


class StateFull(NonstickError):
    """The store keeps as many values outside of sessions as it may (P10). The message names the limit."""


class StoreError(NonstickError):
    """Base of what a store answers. Carries no payload and no session id (P13)."""


class StoreUnavailable(StoreError):
    """The store could not be reached or did not answer in time; the outcome of a write is unknown (P9)."""


class StoreUnusable(StoreUnavailable):
    """The store will not do until somebody changes something: its URL, a login, a permission, or its server.

    A node that starts ends with this; for one that runs it is as if the store could not be reached, and clients get
    503 (P9). The message names the cause and what to do, and may be shown to anybody: it says neither where the store
    is nor what its URL holds (P13).
    """


class Undecryptable(StoreUnavailable):
    """What the store keeps cannot be decrypted: its key is not among this node's, or it was tampered with (P13).

    The message names the key. As for a store that does not answer, clients get 503 and nothing is passed over (P9).
    """


class SessionNotFound(StoreError):
    """No record under this key: it never existed, it expired by the store's clock, or it was deleted (P1)."""


class AlreadyExists(StoreError):
    """`create` found a live record under this key."""


class TooManySessions(StoreError):
    """`create` would exceed a limit; `group` names the one that is full."""

    def __init__(self, group: str) -> None:
        super().__init__(f"session limit reached for group {group!r}")
        self.group = group


class StreamClosed(StoreError):
    """The stream has its terminal event, or never existed: nothing may follow (P3, P7)."""


class Fenced(StoreError):
    """A later attempt took the stream over; this writer is stale (P7)."""


class NotPending(StoreError):
    """The server request that a reply names is not in the session's pending set (P4)."""


class Trimmed(StoreError):
    """The entry at the cursor was dropped; `oldest` is the first position that is left, 0 if none is."""

    def __init__(self, oldest: int) -> None:
        super().__init__(f"the entry at the cursor was dropped; the oldest left is {oldest}")
        self.oldest = oldest


class Diverged(StoreError):
    """The store lost what the caller knows to have been written: at the cursor, or by this writer (P9)."""
