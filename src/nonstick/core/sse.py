"""Server-sent events, as bytes."""

from __future__ import annotations

from typing import Final

__all__ = ["PING", "SSE_HEADERS", "sse_frame", "sse_message", "sse_priming", "sse_retry"]

SSE_HEADERS: Final = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"connection", b"keep-alive"),
    (b"x-accel-buffering", b"no"),
]


PING: Final = b": ping\r\n\r\n"


def sse_message(body: bytes) -> bytes:
    """One SSE event that carries a message and has no id: it is not in the log."""
    return b"event: message\r\ndata: %b\r\n\r\n" % body


def sse_frame(event_id: str, body: bytes) -> bytes:
    """One SSE event that carries a message. JSON has no line breaks outside of strings, and none unescaped in them."""
    return b"id: %b\r\nevent: message\r\ndata: %b\r\n\r\n" % (event_id.encode(), body)


def sse_retry(retry: int) -> bytes:
    """How soon to come back, in milliseconds, without an event."""
    return b"retry: %d\r\n\r\n" % retry


def sse_priming(event_id: str, retry: int | None) -> bytes:
    """An SSE event without data: it gives the client an id to come back with, and how soon, in milliseconds."""
    return b"id: %b\r\n%bdata: \r\n\r\n" % (event_id.encode(), b"" if retry is None else b"retry: %d\r\n" % retry)
