"""Random names and numbers that must not repeat and may be guessed: without a system call for each.

A generator of our own: handlers may seed the module's, after which every request would draw the same names.
"""

from __future__ import annotations

import os
import random

__all__ = ["attempt", "name", "tag"]

_dice = random.Random()  # noqa: S311
if hasattr(os, "register_at_fork"):
    # A server that loads the app and then forks would have all its workers draw the same.
    os.register_at_fork(after_in_child=_dice.seed)


def attempt() -> int:
    """1 to 2 ** 50: the first attempt at a stream. Should the store lose the stream, another one may take its name."""
    return _dice.getrandbits(50) + 1


def name() -> str:
    """16 hexadecimal digits: who writes to a log, or whose turn it is."""
    return f"{_dice.getrandbits(64):016x}"


def tag() -> bytes:
    """8 bytes: an event's tag."""
    return _dice.randbytes(8)
