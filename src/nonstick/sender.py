"""Appending to the stream of a log that belongs to no request: one writer, one append outstanding."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Final

from nonstick.guard import GuardedStore
from nonstick.store import Appended, Batch, Draft

__all__ = ["Sender"]

_PATIENCE: Final = 20.0
"""Seconds; well below `WRITER_SECONDS`, within which a repeat is recognised."""


class Sender:
    """A writer of one log's standalone stream on this node."""

    def __init__(self, store: GuardedStore, key: str) -> None:
        self._store = store
        self._key = key
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
                self._writer, self._sequence = secrets.token_hex(8), 0
            self._sequence += 1
            batch = Batch([event], writer=self._writer, sequence=self._sequence, expect=expect)
            try:
                return await self._store.append(self._key, batch, patience=_PATIENCE)
            except BaseException:
                # Nobody knows whether it was written, so this writer's next number is not known either.
                self._writer = ""
                raise
