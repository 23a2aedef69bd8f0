"""Requests that their client cancelled, wherever they run, or before they arrive (P5).

A cancel is an event of the log, and stays in the record for a while, because it can overtake its request. It is for a
request that was loaded before the cancel; a later request of the same id is another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pydantic_core
from mcp_types import RequestId

from nonstick.core.clipping import cancel_params
from nonstick.core.events import Kind, decode, draft
from nonstick.core.jsonrpc import request_key
from nonstick.errors import SessionNotFound
from nonstick.log.guard import GuardedStore
from nonstick.log.session_log import SessionLog
from nonstick.session.running import Running
from nonstick.store import Batch, Cursor, Event
from nonstick.waiting.retry import retry_until_answered
from nonstick.waiting.tasks import Spawn

__all__ = ["Cancels", "send_cancel"]

_RECENT: Final = 32
"""Cancels that are remembered for requests which were loaded before them, and arrive after them."""


async def send_cancel(
    exchanges: Mapping[str, Running],
    log: SessionLog,
    request_id: RequestId,
    params: Mapping[str, Any],
    *,
    patience: float,
) -> None:
    """The client cancels a request of its own, which is one of these, or may run on another node.

    Raises:
        SessionNotFound, StoreUnavailable: As `Store.append`.
    """
    key = request_key(request_id)
    if (exchange := exchanges.get(key)) is not None:
        exchange.cancel()
        return
    kept = pydantic_core.to_json(cancel_params(request_id, key, params))
    await log.append(Batch([draft(Kind.CANCEL, kept)], cancel=key), patience=patience)


class Cancels:
    """The cancels that the log brings, for the requests that run here.

    Args:
        exchanges: These requests, by the keys of their ids.
    """

    __slots__ = ("_exchanges", "_log", "_recent", "_spawn", "_store")

    def __init__(self, exchanges: Mapping[str, Running], store: GuardedStore, log: SessionLog, spawn: Spawn) -> None:
        self._exchanges = exchanges
        self._store = store
        self._log = log
        self._spawn = spawn
        self._recent: tuple[tuple[int, str], ...] = ()
        """Positions and keys of the latest."""

    def take(self, event: Event) -> None:
        """The log brought this cancel."""
        key = request_key(decode(event.data)["requestId"])
        self._recent = (*self._recent[1 - _RECENT :], (event.position, key))
        exchange = self._exchanges.get(key)
        if exchange is None:
            return
        if exchange.head.position < event.position:
            self.use_up(key)
            exchange.cancel()
        else:
            self._spawn(self._look())

    def concerns(self, key: str, head: Cursor) -> bool:
        """Whether a cancel for this request came after its record was loaded and before it was registered here."""
        return any(position > head.position and cancelled == key for position, cancelled in self._recent)

    def use_up(self, key: str) -> None:
        """A cancel that is left in the record did its work: a later request of that id is another one."""
        self._spawn(self._log.append(Batch([], uncancel=key)))

    async def _look(self) -> None:
        """Cancels what the record says is cancelled.

        A cancel in the log that is not behind a request's beginning was for an earlier request of that id; or the store
        has lost what was behind it, and gives these positions out again. The record keeps only what was not used up.
        """
        try:
            cancels = (await retry_until_answered(lambda: self._store.load(self._log.key))).cancels
        except SessionNotFound:
            return
        for key in cancels & self._exchanges.keys():
            self.use_up(key)
            self._exchanges[key].cancel()
