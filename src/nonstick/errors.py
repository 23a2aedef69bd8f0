"""One tree of errors.

Everything that nonstick raises on purpose is a `NonstickError`. What clients are told of it, HTTP status and words, is
in `core/refusals.py` alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar, Final

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

_LONGEST_CHAIN: Final = 16
"""Causes of an exception that a log shows, one after the other."""


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
    """Base of what a store answers. Carries no payload and no session id (P13).

    Attributes:
        usual: What it says where it is raised without a text, as every store of nonstick raises it.
    """

    usual: ClassVar[str] = "the store refused this"

    # Not in `__init__`: raising one is to cost no call.
    def __str__(self) -> str:
        return super().__str__() or self.usual


class StoreUnavailable(StoreError):
    """The store could not be reached or did not answer in time; the outcome of a write is unknown (P9)."""

    usual = "the store cannot be reached"


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

    usual = "no live session has this key"


class AlreadyExists(StoreError):
    """`create` found a live record under this key."""

    usual = "a live session has this key"


class TooManySessions(StoreError):
    """`create` would exceed a limit; `group` names the one that is full."""

    def __init__(self, group: str) -> None:
        super().__init__(f"session limit reached for group {group!r}")
        self.group = group


class StreamClosed(StoreError):
    """The stream has its terminal event, or never existed: nothing may follow (P3, P7)."""

    usual = "the stream has ended or is not known"


class Fenced(StoreError):
    """A later attempt took the stream over; this writer is stale (P7)."""

    usual = "another attempt holds the stream"


class NotPending(StoreError):
    """The server request that a reply names is not in the session's pending set (P4)."""

    usual = "no such server request is pending"


class Trimmed(StoreError):
    """The entry at the cursor was dropped; `oldest` is the first position that is left, 0 if none is."""

    def __init__(self, oldest: int) -> None:
        super().__init__(f"the entry at the cursor was dropped; the oldest left is {oldest}")
        self.oldest = oldest


class Diverged(StoreError):
    """The store lost what the caller knows to have been written: at the cursor, or by this writer (P9)."""

    usual = "the store lost the entry at the cursor, entries after it, or appends of this writer"


def close_to(word: str, known: Iterable[str]) -> str | None:
    """Which of these was probably meant by somebody who wrote `word`; None if none is like it."""
    return next(iter(difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.75)), None)


def without_text(error: BaseException) -> BaseException:
    """What a log may show of an exception, as `exc_info`: its types and where they were raised, not what they say.

    An exception's text may quote a payload: `ValueError` names the value, a validation error the whole input (P13). Of
    a long or circular chain of causes only the beginning is kept. Never raises. Not public.
    """
    try:
        return _without_text(error, _LONGEST_CHAIN)
    except BaseException:
        # A class of its own kind, which may do anything when it is looked at.
        return RuntimeError("an exception that cannot be shown")


def _without_text(error: BaseException, left: int) -> BaseException:
    kind = type(error)
    shown: BaseException
    if isinstance(error, BaseExceptionGroup) and left:
        inner = [_without_text(one, left // 4) for one in error.exceptions[: max(left // 2, 1)]]
        shown = BaseExceptionGroup(kind.__qualname__, inner)
    else:
        shown = type(kind.__name__, (Exception,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})()
    if error.__cause__ is not None and left:
        shown.__cause__ = _without_text(error.__cause__, left - 1)
    elif error.__context__ is not None and not error.__suppress_context__ and left:
        shown.__context__ = _without_text(error.__context__, left - 1)
    return shown.with_traceback(error.__traceback__)
