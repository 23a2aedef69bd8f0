"""Appending to a log: one append outstanding, and one in doubt is repeated as it was before the next."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from nonstick.core.names import new_name
from nonstick.store import STANDALONE, Appended, Batch, Draft

__all__ = ["Append", "Sender", "Writer", "once"]

_PATIENCE: Final = 20.0
"""Seconds for one append; well below `WRITER_SECONDS`, within which a repeat is recognised."""


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


class Writer:
    """Numbers the appends of one writer, so that the store writes a repeated one once.

    One call at a time, none of which is cancelled: tasks that share a writer hold a lock while they call it.

    Attributes:
        in_doubt: The last append, unless the store acknowledged it. While there is one, nothing but `repeat` and
            `forget` may be called.
    """

    __slots__ = ("_append", "_name", "_sequence", "in_doubt")

    def __init__(self, append: Append) -> None:
        self._append = append
        self._name = new_name()
        self._sequence = 0
        self.in_doubt: Batch | None = None

    async def write(
        self,
        events: Sequence[Draft],
        *,
        stream: int = STANDALONE,
        attempt: int = 1,
        take_over: bool = False,
        terminal: bool = False,
        expect: Sequence[str] = (),
        fields: Mapping[str, bytes | None] | None = None,
        patience: float | None = None,
    ) -> Appended:
        """Appends these events. The arguments are those of a `Batch`, but for the patience, in seconds.

        Raises:
            StoreError: As `Store.append`. The append is in doubt then.
        """
        assert self.in_doubt is None
        self._sequence += 1
        self.in_doubt = batch = Batch(
            events,
            writer=self._name,
            sequence=self._sequence,
            stream=stream,
            attempt=attempt,
            take_over=take_over,
            terminal=terminal,
            expect=expect,
            fields=fields or {},
        )
        appended = await self._append(batch, patience=_PATIENCE if patience is None else patience)
        self.in_doubt = None
        return appended

    async def repeat(self, *, patience: float | None = None) -> Appended:
        """Appends what is in doubt, as it was. It is written once, whatever became of it before.

        Raises:
            StoreError: As `Store.append`. The append is still in doubt.
        """
        assert self.in_doubt is not None
        appended = await self._append(self.in_doubt, patience=_PATIENCE if patience is None else patience)
        self.in_doubt = None
        return appended

    def forget(self) -> None:
        """Goes on as another writer. What became of the append in doubt will not be known, nor is it repeated."""
        self._name, self._sequence, self.in_doubt = new_name(), 0, None


class Sender:
    """A writer of one log's standalone stream on this node."""

    def __init__(self, append: Append) -> None:
        self._writer = Writer(append)
        self._writing = asyncio.Lock()

    async def send(self, event: Draft, expect: Sequence[str] = ()) -> Appended:
        """Appends one event, in the order of the calls.

        Raises:
            SessionNotFound, StoreUnavailable: As `Store.append`.
        """
        async with self._writing:
            try:
                return await self._writer.write([event], expect=expect)
            except BaseException:
                # The caller is told, and may send the event again. This writer's next number is not known.
                self._writer.forget()
                raise
