"""Probes: find out what a server was built with, by having the server use it once while nothing is really done.

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
    """While the block runs, uses are only noted. Yields the list of what was used."""
    used: list[object] = []
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)


def is_probe(thing: object) -> bool:
    """Whether this use of the thing is a probe, and so is to do nothing. Notes the use if so."""
    used = _used.get()
    if used is None:
        return False
    used.append(thing)
    return True
