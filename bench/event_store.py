"""An event store in memory for the SDK, as in its examples, which it brings none of: what a resume costs it."""

from __future__ import annotations

from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from mcp_types import JSONRPCMessage

__all__ = ["InMemoryEventStore"]


class InMemoryEventStore(EventStore):
    """Keeps everything, for as long as the process lives."""

    def __init__(self) -> None:
        self._streams: dict[str, list[EventMessage | None]] = {}
        self._places: dict[str, tuple[str, int]] = {}

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        stream = self._streams.setdefault(stream_id, [])
        event_id = str(len(self._places) + 1)
        self._places[event_id] = (stream_id, len(stream))
        stream.append(None if message is None else EventMessage(message, event_id))
        return event_id

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        if last_event_id not in self._places:
            return None
        stream_id, place = self._places[last_event_id]
        for event in self._streams[stream_id][place + 1 :]:
            if event is not None:
                await send_callback(event)
        return stream_id
