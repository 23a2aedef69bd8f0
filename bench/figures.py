"""What is made of samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

__all__ = ["paired", "share_of"]


def paired(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the rounds' ratios: what slowed a whole round down slowed both sides of its ratio.

    Raises:
        ValueError: They have not the same rounds.
    """
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def share_of(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
