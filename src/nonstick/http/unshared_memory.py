"""Warns where several workers of one server keep their sessions in memory, each its own.

Workers have one parent, one command line and one directory, whichever server starts them. The first to serve takes a
name made of these, which the kernel keeps for that worker while it serves. A worker that finds the name taken is not
alone. Linux has such names.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["warned_of_unshared_memory"]

logger = logging.getLogger(__name__)

_NOT_SHARED: Final = (
    "another worker of this server runs beside this one, and each keeps its sessions in its own memory: a session that "
    "one opens is unknown (404) to the other. Name a store that all workers share: sqlite:///FILE on one machine, "
    "redis:// or postgresql:// on several"
)

_holders: list[socket.socket] = []
"""Sockets that hold the name: one for each app in this process that serves from memory."""


@contextmanager
def warned_of_unshared_memory(store_url: str) -> Iterator[None]:
    """Logs a warning if this store is in memory, and another worker has one too. To be held while the app serves."""
    if not store_url.startswith("memory:") or sys.platform != "linux":
        yield
        return
    holder = _holders[0].dup() if _holders else _take_name()
    if holder is None:
        logger.warning(_NOT_SHARED)
        yield
        return
    _holders.append(holder)
    try:
        yield
    finally:
        _holders.remove(holder)
        holder.close()


def _take_name() -> socket.socket | None:
    """A socket that has the name; None if another process has it."""
    who = repr((os.getuid(), os.getppid(), os.environ.get("PWD"), sys.argv))
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        holder.bind("\0nonstick-memory-" + hashlib.sha256(who.encode()).hexdigest()[:32])
    except OSError:
        holder.close()
        return None
    return holder
