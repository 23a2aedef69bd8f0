"""What a server was built with, found out by having it used once: whoever is used in here notes it, and does nothing.

Neither the SDK nor FastMCP shows which bus, keys and state store a server has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["is_probe", "probed"]

_used: ContextVar[list[object] | None] = ContextVar("nonstick_probed", default=None)


@contextmanager
def probed() -> Iterator[list[object]]:
    """Gives the list of what is used in here."""
    used: list[object] = []
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)


def is_probe(thing: object) -> bool:
    """Whether this use of the thing is only to see that it is there; notes it."""
    used = _used.get()
    if used is None:
        return False
    used.append(thing)
    return True
