"""The frames of a stream, byte by byte."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from nonstick.core.jsonrpc import notification_body
from nonstick.core.sse import sse_frame, sse_priming, sse_retry


@given(st.text())
def test_any_text_makes_one_frame(text: str) -> None:
    """A line break in the data would end it."""
    body = notification_body("n", {"text": text})
    frame = sse_frame("id-1", body)
    assert frame.endswith(b"\r\n\r\n")
    assert frame.count(b"\n") == 4
    fields = dict(line.split(b": ", 1) for line in frame.strip().split(b"\r\n"))
    assert fields[b"id"] == b"id-1"
    assert json.loads(fields[b"data"])["params"]["text"] == text


def test_priming_event_has_no_message() -> None:
    """An id alone."""
    assert sse_priming("i", 500) == b"id: i\r\nretry: 500\r\ndata: \r\n\r\n"
    assert sse_priming("i", None) == b"id: i\r\ndata: \r\n\r\n"
    assert sse_retry(500) == b"retry: 500\r\n\r\n"
