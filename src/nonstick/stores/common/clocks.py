"""A server's clock against this machine's."""

from __future__ import annotations

from typing import Final

from nonstick.stores.common.upkeep import Finding

__all__ = ["clock_finding"]

CLOCK_SECONDS: Final = 5.0
"""How far the server's clock may be from this machine's before it is worth a word."""


def clock_finding(theirs: float, before: float, after: float) -> Finding:
    """`theirs` was read on the server at some time between `before` and `after` on this machine."""
    off = theirs - (before + after) / 2
    sure = (after - before) / 2
    text = f"{abs(off):.3f} s {'ahead of' if off > 0 else 'behind'} this machine's (give or take {sure:.3f} s)"
    if abs(off) - sure > CLOCK_SECONDS:
        return Finding(
            "warning",
            "clock",
            text,
            "Sessions are safe: only the store's clock counts. But the times in logs do not fit together: run an NTP "
            "client on both machines.",
        )
    return Finding("ok", "clock", text)
