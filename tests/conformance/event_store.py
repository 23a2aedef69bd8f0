"""An in-memory event store for the SDK's own transport: what its resumability needs, and no more."""

from __future__ import annotations

from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from mcp_types import JSONRPCMessage

__all__ = ["MemoryEventStore"]


class MemoryEventStore(EventStore):
    """Every event of one process, in order. Ids are indexes from 1.

    The SDK names a stream by the bare request id, so two sessions that share a store can meet in one stream. That is
    the baseline as it is: a server on the SDK alone has nothing better to pass in.
    """

    def __init__(self) -> None:
        self._events: list[tuple[str, JSONRPCMessage | None]] = []

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        self._events.append((stream_id, message))
        return str(len(self._events))

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        if not last_event_id.isascii() or not last_event_id.isdigit():
            return None
        last = int(last_event_id)
        if not 1 <= last <= len(self._events):
            return None
        stream_id = self._events[last - 1][0]
        for index, (stream, message) in enumerate(self._events[last:], start=last + 1):
            # A priming event has no message, and only says where a stream began.
            if stream == stream_id and message is not None:
                await send_callback(EventMessage(message, str(index)))
        return stream_id
