"""How long to wait before trying again, so that a server in trouble is not asked by everybody at once."""

from __future__ import annotations

import random
from typing import Final

__all__ = ["backoff"]

_FIRST_SECONDS: Final = 0.05
_MOST_SECONDS: Final = 1.0


def backoff(failures: int) -> float:
    """Seconds to wait before the next attempt, after that many failures in a row: doubling, capped, jittered."""
    return min(_MOST_SECONDS, _FIRST_SECONDS * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0)  # noqa: S311
