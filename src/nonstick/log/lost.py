"""Ending streams that no node runs any more: their clients, and the log's bounds, wait for their end (P9, P10)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from nonstick.core.events import Kind, draft
from nonstick.core.jsonrpc import error_body
from nonstick.core.refusals import NODE_LOST, Failure
from nonstick.errors import Fenced, StreamClosed
from nonstick.log.guard import GuardedStore
from nonstick.log.survey import OpenStream, survey, unfinished
from nonstick.log.writer import once
from nonstick.store import Appended, Batch

__all__ = ["Write", "end_lost", "end_open", "end_stream"]

Write = Callable[[Batch], Awaitable[Appended]]
"""`Store.append` to the log in question, which may do more: see to the log's size, say."""

_CERTAIN_AFTER: Final = 1.0
"""Seconds between two looks at a lease, of which both must say that its node is gone."""


async def end_stream(write: Write, stream: int, attempt: int, body: bytes) -> None:
    """Writes the end of a stream, unless it has one, or another attempt began.

    Raises:
        SessionNotFound, StoreUnavailable, Diverged: As `Store.append`; may be called again.
    """
    with contextlib.suppress(StreamClosed, Fenced):
        await write(once(draft(Kind.TERMINAL, body), stream=stream, attempt=attempt, terminal=True))


async def end_open(write: Write, stream: OpenStream, failure: Failure) -> None:
    """Ends this stream with this failure: its request may be made again if no node had begun it.

    Raises:
        SessionNotFound, StoreUnavailable, Diverged: As `Store.append`; may be called again.
    """
    life = stream.life
    body = error_body(life.request_id, failure.error(retry_safe=life.is_relayed))
    await end_stream(write, stream.name, life.attempt, body)


async def end_lost(store: GuardedStore, key: str, write: Write, *, here: str) -> bool:
    """Ends the streams of nodes that are gone: nobody may ever resume them, and the log keeps what has not ended.

    Returns whether there were any.

    Args:
        here: This node, which knows better what it runs.

    Raises:
        SessionNotFound, StoreUnavailable, Diverged: As the store's methods.
    """
    nodes = {sketch.node for sketch in (await unfinished(store, key)).streams.values()}
    lost = await store.lapsed(nodes - {here})
    if not lost:
        return False
    # Twice, because after an outage of the store every lease has lapsed.
    await asyncio.sleep(_CERTAIN_AFTER)
    lost &= await store.lapsed(lost)
    found = await survey(store, key, lambda sketch: sketch.node in lost)
    ended = [stream for stream in found.open if not stream.life.is_relayed]
    for stream in ended:
        await end_open(write, stream, NODE_LOST)
    return bool(ended)
