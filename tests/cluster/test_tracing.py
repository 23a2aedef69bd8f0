"""One trace follows a request: to the node that runs it, and to the client that it asks (P18). Spans are real."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nonstick.testing.cluster import HEADERS, Session
from nonstick.testing.servers.processes import NodeProcess
from tests.cluster.sse import Stream
from tests.cluster.stage import call, eventually, text_of

pytestmark = pytest.mark.anyio

FIRST, SECOND = "a" * 32, "b" * 32
"""Traces of a client's."""


def traced(trace: str, who: str) -> dict[str, str]:
    """Headers of a request in this trace."""
    return {"traceparent": f"00-{trace}-{'1' * 16}-01", "baggage": f"who={who}"}


class Remote:
    """A client of one process."""

    def __init__(self, node: NodeProcess, http: httpx2.AsyncClient) -> None:
        self.url = node.url
        self._http = http

    def stream(self, method: str, session: Session, message: Any = None, **headers: str) -> Any:
        return self._http.stream(method, self.url, json=message, headers={**HEADERS, **session.headers, **headers})

    async def post(self, message: Any, headers: dict[str, str]) -> httpx2.Response:
        return await self._http.post(self.url, json=message, headers={**HEADERS, **headers})

    async def open(self, headers: dict[str, str]) -> Session:
        capabilities: dict[str, Any] = {"elicitation": {}, "sampling": {}, "roots": {}}
        client = {"name": "t", "version": "1"}
        params = {"protocolVersion": "2025-11-25", "capabilities": capabilities, "clientInfo": client}
        response = await self.post({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}, headers)
        session = Session(response.headers["mcp-session-id"], "2025-11-25", {})
        await self.post({"jsonrpc": "2.0", "method": "notifications/initialized"}, session.headers)
        return session


class Traces:
    """Processes that serve one server, and the spans that they made."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._file = home / "spans.jsonl"
        self.http = httpx2.AsyncClient(timeout=60)

    def node(self, name: str, **env: str) -> NodeProcess:
        return NodeProcess(
            "tests.cluster.traced:app",
            name=name,
            store=f"sqlite:///{self._home}/sessions.db",
            env={"TRACED_SPANS": str(self._file), "PYTHONDEVMODE": "", **env},
            log=self._home / f"{name}.log",
        )

    def spans(self, **wanted: str) -> list[dict[str, Any]]:
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        spans = [json.loads(line) for line in lines if line.endswith("}")]
        return [span for span in spans if all(span[name] == value for name, value in wanted.items())]

    async def span(self, **wanted: str) -> dict[str, Any]:
        """The one span that has these, once it has ended."""
        await eventually(lambda: bool(self.spans(**wanted)))
        [span] = self.spans(**wanted)
        return span


@asynccontextmanager
async def traces(home: Path, placement: str) -> AsyncIterator[tuple[Traces, Remote, Remote]]:
    found = Traces(home)
    options = json.dumps({"placement": placement})
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(found.http)
        nodes = [found.node(name, TRACED_OPTIONS=options) for name in "ab"]
        await asyncio.gather(*(stack.enter_async_context(node) for node in nodes))
        a, b = (Remote(node, found.http) for node in nodes)
        yield found, a, b


async def ask(
    remote: Remote, replier: Remote, session: Session, method: str, reply: dict[str, Any], **headers: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a tool asked, and what it answered once it had its reply."""
    stream = Stream(remote, "POST", session, call("tool", method, asks=method), headers)  # type: ignore[arg-type]
    try:
        question = await stream.message()
        told = await replier.post({"jsonrpc": "2.0", "id": question["id"], **reply}, session.headers)
        assert told.status_code == 202
        return question, json.loads(text_of((await stream.rest())[-1]))
    finally:
        await stream.close()


REPLIES: dict[str, dict[str, Any]] = {
    "elicitation/create": {"result": {"action": "decline"}},
    "sampling/createMessage": {
        "result": {"role": "assistant", "content": {"type": "text", "text": "x"}, "model": "m"},
    },
    "roots/list": {"error": {"code": -5, "message": "no roots"}},
    "ping": {"result": {}},
}


def shape(span: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on ids."""
    attributes = {name: value for name, value in span["attributes"].items() if name != "jsonrpc.request.id"}
    return {**{name: span[name] for name in ("name", "kind", "status", "events")}, "attributes": attributes}


async def test_server_requests_have_own_spans(tmp_path: Path) -> None:
    """P18, P4: each is a span of its own under that of its handler, and the client gets its context."""
    async with traces(tmp_path, "any") as (found, a, b):
        node = found.node("sdk", TRACED_SDK="1")
        async with node:
            sdk = Remote(node, found.http)
            theirs = await sdk.open({})
            ours = await a.open({})
            for method, reply in REPLIES.items():
                await ask(sdk, sdk, theirs, method, reply, **traced(FIRST, "sdk"))
                question, _ = await ask(b, a, ours, method, reply, **traced(SECOND, "us"))
                expected = await found.span(name=f"MCP send {method}", node="sdk")
                span = await found.span(name=f"MCP send {method}", node="b")
                assert shape(span) == shape(expected)
                assert span["attributes"]["jsonrpc.request.id"] == question["id"]
                meta = question["params"]["_meta"]
                assert meta["traceparent"] == f"00-{SECOND}-{span['span']}-01"
                assert meta["baggage"] == "who=us"
                assert meta.get("kept") == (1 if method == "sampling/createMessage" else None)
                parent = await found.span(span=span["parent"], node="b")
                assert (parent["name"], parent["trace"]) == ("tools/call tool", SECOND)


@pytest.mark.parametrize("placement", [pytest.param("any", marks=pytest.mark.slow), "owner"])
async def test_handler_runs_in_own_trace(tmp_path: Path, placement: str) -> None:
    """P18: and never in that of who opened the session, wherever it runs."""
    async with traces(tmp_path, placement) as (found, a, b):
        session = await a.open(traced(FIRST, "opener"))
        for number, remote in enumerate((b, a, b)):
            trace, who = f"{number + 1:032x}", f"caller-{number}"
            response = await remote.post(call("tool", number), {**session.headers, **traced(trace, who)})
            assert json.loads(text_of(response.json())) == {"who": who, "trace": trace, "shown": None}
            handler = await found.span(name="tools/call tool", trace=trace)
            assert handler["node"] == ("a" if placement == "owner" or remote is a else "b")
            host = await found.span(name="http", trace=trace)
            assert handler["parent"] == host["span"]
            assert host["node"] == ("a" if remote is a else "b")
        meta = {"traceparent": f"00-{SECOND}-{'2' * 16}-01"}
        response = await b.post(call("tool", 9, meta=meta), {**session.headers, **traced(FIRST, "header")})
        assert json.loads(text_of(response.json()))["trace"] == SECOND
