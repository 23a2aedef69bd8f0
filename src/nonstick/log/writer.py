"""Who writes to a log: one writer, one append outstanding, and each batch once, however often it is repeated."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Protocol

from nonstick.core.names import new_name
from nonstick.store import STANDALONE, Appended, Batch, Draft

__all__ = ["Append", "Sender", "once"]

_PATIENCE: Final = 20.0
"""Seconds; well below `WRITER_SECONDS`, within which a repeat is recognised."""


def once(
    event: Draft, *, stream: int = STANDALONE, attempt: int = 1, terminal: bool = False, answers: str | None = None
) -> Batch:
    """A batch of one event, by a writer of its own: the store writes it once, however often it is appended.

    Args:
        stream: As in `Batch`, like the others.
    """
    return Batch(
        [event],
        writer=new_name(),
        sequence=1,
        stream=stream,
        attempt=attempt,
        terminal=terminal,
        answers=answers,
    )


class Append(Protocol):
    """`Store.append` to one log, with so much patience, in seconds."""

    async def __call__(self, batch: Batch, /, *, patience: float) -> Appended: ...


class Sender:
    """A writer of one log's standalone stream on this node."""

    def __init__(self, append: Append) -> None:
        self._append = append
        self._writer = ""
        self._sequence = 0
        self._writing = asyncio.Lock()

    async def send(self, event: Draft, expect: Sequence[str] = ()) -> Appended:
        """Appends one event, in the order of the calls.

        Raises:
            SessionNotFound, StoreUnavailable: As `Store.append`.
        """
        async with self._writing:
            if not self._writer:
                self._writer, self._sequence = new_name(), 0
            self._sequence += 1
            batch = Batch([event], writer=self._writer, sequence=self._sequence, expect=expect)
            try:
                return await self._append(batch, patience=_PATIENCE)
            except BaseException:
                # Nobody knows whether it was written, so this writer's next number is not known either.
                self._writer = ""
                raise
