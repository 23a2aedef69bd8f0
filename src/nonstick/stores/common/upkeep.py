"""What was found out about a store, and what to do about it. `nonstick doctor` shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

__all__ = ["Examinable", "Finding", "Level"]

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Nothing in it is secret: no password, session id or payload (P13).

    Attributes:
        level: "ok"; "warning": it works, and something is worth knowing or changing; "error": sessions will fail or be
            lost like this.
        subject: What was looked at, in a word or two: "version", "clock".
        text: What was found.
        advice: What to do, as a sentence; "" where there is nothing to do.
        blocks: Nothing can be tried on the store before this is put right.
        lasts: No failover or restart puts it right either: the URL names the wrong thing.
    """

    level: Level
    subject: str
    text: str
    advice: str = ""
    blocks: bool = False
    lasts: bool = False


@runtime_checkable
class Examinable(Protocol):
    """A store that knows what can be wrong with its server. Optional: `nonstick doctor` tries any store as it is."""

    async def examine(self) -> list[Finding]:
        """Looks at the server: version, settings, permissions, clock. Makes no tables and leaves nothing behind.

        May be called whether or not the store is entered. What cannot be looked at is a finding too.

        Raises:
            StoreUnavailable: It cannot be reached, or lets nobody in.
            ConfigurationError: It can never work like this.
        """
        ...
