"""What clients say of themselves, parsed once for all that say the same: most clients of a server do.

Bounded by bytes, and forgotten when no session has used it for a while: parsed, JSON takes many times its size (P10).
"""

from __future__ import annotations

from typing import Final

from mcp_types import InitializeRequestParams

__all__ = ["INTRODUCTIONS", "Introductions"]

_LONGEST: Final = 1024
_MOST: Final = 64


class Introductions:
    """Parsed `initialize` params, by their bytes. What is long, or too much, is parsed each time.

    Args:
        longest: Bytes, at most, of those that are kept.
        most: How many are kept of those used since the last `age`, and as many again of those used before.

    Attributes:
        recent: Those that were used since `age` was called last.
    """

    def __init__(self, *, longest: int = _LONGEST, most: int = _MOST) -> None:
        self._longest = longest
        self._most = most
        self.recent: dict[bytes, InitializeRequestParams] = {}
        self._before: dict[bytes, InitializeRequestParams] = {}

    def __len__(self) -> int:
        return len(self.recent | self._before)

    def parse(self, data: bytes) -> InitializeRequestParams:
        """The params in this JSON."""
        params = self._before.pop(data, None) or InitializeRequestParams.model_validate_json(data, by_name=False)
        if len(data) <= self._longest:
            if len(self.recent) >= self._most:
                self.age()
            self.recent[data] = params
        return params

    def age(self) -> None:
        """Forgets what was not used since this was called before."""
        self._before, self.recent = self.recent, {}


INTRODUCTIONS: Final = Introductions()
"""What the clients of this process said of themselves."""
