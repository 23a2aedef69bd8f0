"""Requests as clients should and should not send them, and what came back, in a form that can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import httpx2

from nonstick.testing.cluster import HEADERS, Session
from tests.cluster.servers import call, messages, opening, request

SessionKind = Literal["live", "fresh", "none", "unknown", "malformed"]
"""Which session id goes along; of a fresh session the client has not said that it is initialized."""


@dataclass(frozen=True)
class Raw:
    """One HTTP request. A header that is None is left out."""

    name: str
    body: Any = b""
    method: str = "POST"
    session: SessionKind = "live"
    headers: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class Outcome(NamedTuple):
    """What of a response has to agree."""

    status: int
    content_type: str
    code: int | None
    message: str | None
    named: bool
    """Whether it carries a session id."""
    allow: str | None = None


def outcome(response: httpx2.Response) -> Outcome:
    content_type = response.headers.get("content-type", "").split(";")[0]
    code = message = None
    if content_type in ("application/json", "text/event-stream"):
        failure: dict[str, Any] = next((m["error"] for m in messages(response) if "error" in m), {})
        code, message = failure.get("code"), failure.get("message")
    else:
        message = response.text or None
    return Outcome(
        response.status_code,
        content_type,
        code,
        message,
        "mcp-session-id" in response.headers,
        response.headers.get("allow"),
    )


async def send(client: httpx2.AsyncClient, url: str, raw: Raw, sessions: Mapping[str, Session]) -> httpx2.Response:
    """Sends it and reads the response; of an endless stream the head alone."""
    own = {"live": sessions.get("live"), "fresh": sessions.get("fresh")}.get(raw.session)
    headers: dict[str, str | None] = {**HEADERS, **(own.headers if own else {})}
    if raw.session in ("unknown", "malformed"):
        headers["mcp-session-id"] = "u" * 32 if raw.session == "unknown" else "no-such"
    headers |= raw.headers
    present = [(name.encode(), value.encode()) for name, value in headers.items() if value is not None]
    async with client.stream(raw.method, url, content=raw.content, headers=present) as response:
        endless = raw.method == "GET" and response.headers.get("content-type", "").startswith("text/event-stream")
        if not endless:
            await response.aread()
            return response
        return httpx2.Response(response.status_code, headers=response.headers, content=b"")


def _params(text: str) -> bytes:
    """A tool call whose arguments are this JSON text."""
    return b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":%b}}' % text.encode()


_PING = request("ping")

GOOD = (
    Raw("ping", _PING),
    Raw("tool call", call("echo", text="hi")),
    Raw("list", request("tools/list")),
    Raw("empty params", request("ping", {})),
    Raw("string id", request("ping", id="seven")),
    Raw("empty string id", request("ping", id="")),
    Raw("large int id", request("ping", id=2**53 + 1)),
    Raw("negative id", request("ping", id=-1)),
    Raw("initialize", opening(), session="none"),
    Raw("initialize, unknown version", opening("1999-01-01"), session="none"),
    Raw("initialize, old version", opening("2024-11-05"), session="none"),
    Raw("initialize again", opening()),
    Raw("before initialized", call("echo"), session="fresh"),
    Raw("ping before initialized", _PING, session="fresh"),
    Raw("notification", {"jsonrpc": "2.0", "method": "notifications/initialized"}),
    Raw("unknown notification", {"jsonrpc": "2.0", "method": "notifications/gossip", "params": {"x": 1}}),
    Raw("notification with bad params", {"jsonrpc": "2.0", "method": "notifications/progress", "params": {}}),
    Raw("cancel of nothing", {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 99}}),
    Raw("cancel without an id", {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {}}),
    Raw("reply to nothing", {"jsonrpc": "2.0", "id": "srv-1", "result": {}}),
    Raw("error reply to nothing", {"jsonrpc": "2.0", "id": 5, "error": {"code": 1, "message": "no"}}),
    Raw("error reply without id", {"jsonrpc": "2.0", "id": None, "error": {"code": 1, "message": "no"}}),
    Raw("charset", _PING, headers={"content-type": "application/json; charset=utf-8"}),
    Raw("accept all", _PING, headers={"accept": "*/*"}),
    Raw("accept by type", _PING, headers={"accept": "application/*, text/*"}),
    Raw("accept with weights", _PING, headers={"accept": "application/json;q=0.9, text/event-stream;q=0.1"}),
    Raw("no protocol version", _PING, headers={"mcp-protocol-version": None}),
    Raw("other protocol version", _PING, headers={"mcp-protocol-version": "2024-11-05"}),
    Raw("space before the message", b" \n\t" + json.dumps(_PING).encode()),
    Raw("duplicate keys", b'{"jsonrpc":"2.0","id":1,"id":2,"method":"gossip","method":"ping"}'),
    Raw("extra members", {**_PING, "extra": [1]}),
    Raw("big number", _params('{"n":' + "9" * 400 + "}")),
    Raw("tiny number", _params('{"n":1e-999}')),
    Raw("get", method="GET", headers={"accept": "text/event-stream"}),
)
"""What a client may send."""

BAD = (
    Raw("empty body", b""),
    Raw("half a message", b'{"jsonrpc":"2.0",'),
    Raw("word", b"hello"),
    Raw("null", b"null"),
    Raw("empty text", b'""'),
    Raw("text", b'"ping"'),
    Raw("number", b"1"),
    Raw("true", b"true"),
    Raw("empty object", b"{}"),
    Raw("empty batch", b"[]"),
    Raw("batch", [_PING]),
    Raw("batch of many", [_PING, request("ping", id=2)]),
    Raw("empty lists", b"[" + b"[]," * 10_000 + b"[]]"),
    Raw("nested lists in a batch", b"[" * 100_000),
    Raw("two messages", json.dumps(_PING).encode() * 2),
    Raw("invalid UTF-8", b'{"jsonrpc":"2.0","id":1,"method":"\xff\xfe"}'),
    Raw("UTF-16", json.dumps(_PING).encode("utf-16")),
    Raw("byte order mark", b"\xef\xbb\xbf" + json.dumps(_PING).encode()),
    Raw("NaN", _params('{"n":NaN}')),
    Raw("Infinity", _params('{"n":-Infinity}')),
    Raw("too large number", _params('{"n":1e999}')),
    Raw("too many digits", _params('{"n":' + "9" * 10_000 + "}")),
    Raw("lone surrogate", _params('{"n":"\\ud800"}')),
    Raw("lone surrogate as id", b'{"jsonrpc":"2.0","id":"\\udfff","method":"ping"}'),
    Raw("nested lists", _params("[" * 60 + "]" * 60)),
    Raw("deeply nested lists", _params('{"x":' + "[" * 150 + "]" * 150 + "}")),
    Raw("very deeply nested lists", _params("[" * 50_000 + "]" * 50_000)),
    Raw("very deeply nested objects", _params('{"a":' * 50_000 + "1" + "}" * 50_000)),
    Raw("id 1.5", request("ping", id=1.5)),
    Raw("id 1.0", b'{"jsonrpc":"2.0","id":1.0,"method":"ping"}'),
    Raw("id true", request("ping", id=True)),
    Raw("id null", {"jsonrpc": "2.0", "id": None, "method": "ping"}),
    Raw("id object", request("ping", id={})),
    Raw("id list", request("ping", id=[1])),
    Raw("id of many digits", b'{"jsonrpc":"2.0","id":' + b"9" * 400 + b',"method":"ping"}'),
    Raw("long id", request("ping", id="i" * 100_000)),
    Raw("long method", request("m" * 100_000)),
    Raw("empty method", request("")),
    Raw("method with a line break", request("a\r\nb: c\r\n\r\n")),
    Raw("method 7", {"jsonrpc": "2.0", "id": 1, "method": 7}),
    Raw("no method", {"jsonrpc": "2.0", "id": 1}),
    Raw("jsonrpc 1.0", {"jsonrpc": "1.0", "id": 1, "method": "ping"}),
    Raw("no jsonrpc", {"id": 1, "method": "ping"}),
    Raw("params list", request("ping", [1])),
    Raw("params text", request("ping", "x")),
    Raw("method and result", {**_PING, "result": {}}),
    Raw("result without id", {"jsonrpc": "2.0", "result": {}}),
    Raw("result list", {"jsonrpc": "2.0", "id": 1, "result": []}),
    Raw("error text", {"jsonrpc": "2.0", "id": 1, "error": "x"}),
    Raw("unknown method", request("gossip")),
    Raw("method of a later version", request("server/discover")),
    Raw("method of the other side", request("sampling/createMessage", {})),
    Raw("method without a handler", request("prompts/list")),
    Raw("bad params", request("tools/call", {"arguments": 5})),
    Raw("bad meta", request("tools/call", {"name": "echo", "_meta": 5})),
    Raw("bad progress token", request("tools/call", {"name": "echo", "_meta": {"progressToken": []}})),
    Raw("unknown tool", call("nothing")),
    Raw("tool that raises", call("boom")),
    Raw("initialize as a notification", {"jsonrpc": "2.0", "method": "initialize"}, session="none"),
    Raw("initialize without params", request("initialize"), session="none"),
    Raw("initialize with a list", request("initialize", []), session="none"),
    Raw("initialize with bad version", request("initialize", {"protocolVersion": {"a": 1}}), session="none"),
    Raw("initialize, id null", {**opening(), "id": None}, session="none"),
    Raw("initialize, surrogate in the name", b"".join(
        (b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},',
         b'"clientInfo":{"name":"\\ud800","version":"1"}}}')), session="none"),
    Raw("no content type", _PING, headers={"content-type": None}),
    Raw("text content type", _PING, headers={"content-type": "text/plain"}),
    Raw("content type like JSON", _PING, headers={"content-type": "application/jsonp"}),
    Raw("no accept", _PING, headers={"accept": ""}),
    Raw("accept JSON only", _PING, headers={"accept": "application/json"}),
    Raw("accept stream only", _PING, headers={"accept": "text/event-stream"}),
    Raw("accept text", _PING, headers={"accept": "text/html"}),
    Raw("no session id", _PING, session="none"),
    Raw("notification without session id", {"jsonrpc": "2.0", "method": "notifications/initialized"}, session="none"),
    Raw("garbage without session id", b"{", session="none"),
    Raw("batch without session id", [opening()], session="none"),
    Raw("GET without session id", method="GET", session="none", headers={"accept": "text/event-stream"}),
    Raw("DELETE without session id", method="DELETE", session="none"),
    Raw("PUT without session id", method="PUT", session="none"),
    Raw("unknown session id", _PING, session="unknown"),
    Raw("unknown session id, garbage", b"{", session="unknown"),
    Raw("unknown session id, text", b"{", session="unknown", headers={"content-type": "text/plain"}),
    Raw("unknown session id, initialize", opening(), session="unknown"),
    Raw("unknown session id, GET", method="GET", session="unknown", headers={"accept": "text/event-stream"}),
    Raw("unknown session id, GET without accept", method="GET", session="unknown", headers={"accept": ""}),
    Raw("unknown session id, DELETE", method="DELETE", session="unknown"),
    Raw("unknown session id, PUT", method="PUT", session="unknown"),
    Raw("malformed session id", _PING, session="malformed"),
    Raw("empty session id", _PING, session="none", headers={"mcp-session-id": ""}),
    Raw("session id with spaces", _PING, session="none", headers={"mcp-session-id": "a b c d e f g h i j k l m n"}),
    Raw("session id of other letters", _PING, session="none", headers={"mcp-session-id": "é" * 32}),
    Raw("long session id", _PING, session="none", headers={"mcp-session-id": "a" * 8_000}),
    Raw("unknown protocol version", _PING, headers={"mcp-protocol-version": "1999-01-01"}),
    Raw("garbled protocol version", _PING, headers={"mcp-protocol-version": "é\x7f"}),
    Raw("GET without accept", method="GET", headers={"accept": ""}),
    Raw("GET that accepts JSON", method="GET", headers={"accept": "application/json"}),
    Raw("GET after no event", method="GET", headers={"accept": "text/event-stream", "last-event-id": "garbage"}),
    Raw("PUT", method="PUT"),
    Raw("PATCH", _PING, method="PATCH"),
    Raw("OPTIONS", method="OPTIONS"),
    Raw("HEAD", method="HEAD"),
    Raw("large body", b'"' + b"x" * (5 * 1024 * 1024) + b'"'),
    Raw("large body without session id", b'"' + b"x" * (5 * 1024 * 1024) + b'"', session="none"),
    Raw("other host", _PING, headers={"host": "evil.example"}),
    Raw("other host, unknown session id", _PING, session="unknown", headers={"host": "evil.example"}),
    Raw("other host, no session id", opening(), session="none", headers={"host": "evil.example"}),
    Raw("other host, text", _PING, headers={"host": "evil.example", "content-type": "text/plain"}),
    Raw("other origin", _PING, headers={"origin": "http://evil.example"}),
    Raw("other origin, GET", method="GET", headers={"origin": "http://evil.example"}),
    Raw("other origin, DELETE", method="DELETE", headers={"origin": "http://evil.example"}),
)  # fmt: skip
"""What a client should not send."""
