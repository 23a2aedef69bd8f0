"""Progress on a terminal; nothing anywhere else."""

from __future__ import annotations

import sys

__all__ = ["Bar"]


class Bar:
    """One line that says how far the run is, and what it does now."""

    def __init__(self, total: int, *, shown: bool = True) -> None:
        self._total = total
        self._done = 0
        self._shown = shown and sys.stderr.isatty()

    def step(self, what: str = "") -> None:
        """The next of the steps begins, or one more is done."""
        self._done = min(self._done + 1, self._total)
        if self._shown:
            full = 30 * self._done // self._total
            sys.stderr.write(f"\r[{'#' * full:<30}] {self._done}/{self._total} {what[:70]}\x1b[K")
            sys.stderr.flush()

    def close(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
