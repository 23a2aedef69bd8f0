"""A refusal as a client gets it."""

from __future__ import annotations

import json

import pytest
from starlette.types import Message

from nonstick.core.refusals import Reason, Refusal
from nonstick.http.respond import refuse

pytestmark = pytest.mark.anyio


class Client:
    """Takes ASGI messages."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def send(self, message: Message) -> None:
        self.messages.append(message)


async def test_refusal_explains_itself_in_json() -> None:
    client = Client()
    refusal = Refusal(Reason(405, "no", allow="GET", retry_after=3))
    await refuse(client.send, refusal, [(b"x", b"y")])
    head, body = client.messages
    headers = dict(head["headers"])
    assert head["status"] == 405
    assert headers[b"allow"] == b"GET"
    assert headers[b"retry-after"] == b"3"
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"x"] == b"y"
    assert int(headers[b"content-length"]) == len(body["body"])
    assert json.loads(body["body"]) == {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "no"}}


async def test_plain_refusal_is_text() -> None:
    """It changes no header that it was given."""
    client, given_headers = Client(), [(b"x", b"y")]
    await refuse(client.send, Refusal(Reason(403, "no", plain=True)), given_headers)
    assert client.messages[1]["body"] == b"no"
    assert given_headers == [(b"x", b"y")]
