"""The SDK's own manager and a nonstick node get the same requests, and differ only where that is meant.

docs/differences.md gives every difference with its reason.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from nonstick.stores.memory import MemoryStore
from nonstick.testing.cluster import Cluster, Member, Session
from tests.cluster.conftest import one
from tests.cluster.raw import BAD, GOOD, Outcome, Raw, outcome, send
from tests.cluster.servers import World, call, messages, opening, request

pytestmark = pytest.mark.anyio

DOCUMENT: Final = Path(__file__).resolve().parents[2] / "docs" / "differences.md"

INVALID: Final = "Validation error: the body must be one JSON-RPC 2.0 request, notification or response"
BATCH: Final = "Validation error: JSON-RPC batches are not supported; send one message a request"


@dataclass(frozen=True)
class Difference:
    """Where nonstick answers otherwise, and how. The title is one of those in the document."""

    title: str
    applies: Callable[[Raw, Outcome, str], bool]
    ours: Callable[[Outcome], Outcome]


def _is(*names: str) -> Callable[[Raw, Outcome, str], bool]:
    return lambda raw, _sdk, _mode: raw.name in names


def _is_batch(raw: Raw) -> bool:
    return raw.content.lstrip().startswith(b"[") and raw.method == "POST"


DIFFERENCES: Final = (
    Difference(
        "Answers are JSON first",
        lambda raw, sdk, mode: mode == "auto" and raw.method == "POST" and sdk.content_type == "text/event-stream",
        lambda sdk: sdk._replace(content_type="application/json"),
    ),
    Difference(
        "A failed initialize gives no session",
        lambda raw, sdk, mode: raw.session == "none" and raw.name.startswith("initialize ") and sdk.status == 200,
        lambda sdk: sdk._replace(named=False, content_type="application/json"),
    ),
    Difference(
        "Errors without a session carry no session id",
        lambda raw, sdk, mode: raw.session == "none" and sdk.named and sdk.status >= 400,
        lambda sdk: sdk._replace(named=False),
    ),
    Difference(
        "Batches are refused before they are parsed",
        lambda raw, sdk, mode: _is_batch(raw) and sdk.status == 400,
        lambda sdk: sdk._replace(code=-32602, message=BATCH),
    ),
    Difference(
        "Validation errors do not repeat the body",
        lambda raw, sdk, mode: (sdk.message or "").startswith("Validation error") and not _is_batch(raw),
        lambda sdk: sdk._replace(message=INVALID),
    ),
    Difference(
        "NaN and Infinity are not JSON",
        _is("NaN"),
        lambda sdk: _parse_error("expected value at line 1 column 88"),
    ),
    Difference(
        "NaN and Infinity are not JSON",
        _is("Infinity"),
        lambda sdk: _parse_error("invalid number at line 1 column 89"),
    ),
    *(
        Difference(
            "Names have a longest length",
            _is(name),
            lambda sdk, what=what: Outcome(  # type: ignore[misc]
                400, "application/json", -32600, f"Bad Request: the {what}", named=True
            ),
        )
        for name, what in (
            ("long id", "request id is longer than 1024 characters"),
            ("id of many digits", "request id is longer than 63 bits"),
            ("long method", "method is longer than 256 characters"),
        )
    ),
    Difference(
        "JSON has a depth limit",
        _is("deeply nested lists"),
        lambda sdk: _parse_error("nested in more than 64 levels"),
    ),
    Difference(
        "Host, Origin and Content-Type are checked before the session",
        _is("unknown session id, text"),
        lambda sdk: Outcome(400, "", None, "Invalid Content-Type header", named=False),
    ),
    Difference(
        "Host, Origin and Content-Type are checked before the session",
        _is("other host, unknown session id"),
        lambda sdk: Outcome(421, "", None, "Invalid Host header", named=False),
    ),
    Difference(
        "Every stream can be resumed",
        _is("GET after no event"),
        lambda sdk: Outcome(
            400,
            "application/json",
            -32600,
            "Bad Request: Last-Event-ID is not an id that this session's streams sent",
            named=True,
        ),
    ),
)


def _parse_error(what: str) -> Outcome:
    return Outcome(400, "application/json", -32700, f"Parse error: {what}", named=True)


@asynccontextmanager
async def both(mode: str) -> AsyncIterator[tuple[World, Member, Member]]:
    """The SDK's own app of a server, and nonstick's of the same server."""
    world = World()
    as_json = mode == "json"
    sdk = Member("sdk", world.server().streamable_http_app(json_response=as_json))  # type: ignore[arg-type]
    async with Cluster(
        world.server,
        one(MemoryStore()),
        nodes=1,
        app_options={"json_response": as_json},
        answer={"auto": "auto", "sse": "sse", "json": "json"}[mode],  # type: ignore[arg-type]
    ) as (ours,):
        await sdk.start()
        try:
            yield world, sdk, ours
        finally:
            # An open GET would hold up the server's stop: the SDK is not told of that before the last one is closed.
            sdk.server.force_exit = True
            await sdk.stop()


async def sessions_on(member: Member) -> dict[str, Session]:
    return {"live": await member.open(), "fresh": await member.open(initialized=False)}


@pytest.mark.parametrize("mode", ["auto", "sse", "json"])
@pytest.mark.parametrize("raws", [GOOD, BAD], ids=["good", "bad"])
async def test_node_answers_as_the_sdk_does(mode: str, raws: Sequence[Raw]) -> None:
    """But for the documented differences."""
    async with both(mode) as (_world, sdk, ours):
        theirs, own = await sessions_on(sdk), await sessions_on(ours)
        seen: set[str] = set()
        for raw in raws:
            response = await send(sdk.client, sdk.url, raw, theirs)
            expected = outcome(response)
            for difference in DIFFERENCES:
                if difference.applies(raw, expected, mode):
                    seen.add(difference.title)
                    expected = difference.ours(expected)
            answered = await send(ours.client, ours.url, raw, own)
            assert outcome(answered) == expected, raw.name
            if expected.status == 200 and raw.method == "POST":
                # Not only the outcome: the whole last message.
                assert messages(answered)[-1] == _notifying(messages(response)[-1]), raw.name
        if raws is BAD:
            assert seen == {d.title for d in DIFFERENCES} - ({"Answers are JSON first"} if mode != "auto" else set())


def _notifying(message: Any) -> Any:
    """The SDK's answer, with what is offered here beyond it: "Clients are told of changed lists"."""
    for capability in message.get("result", {}).get("capabilities", {}).values():
        if "listChanged" in capability:
            capability["listChanged"] = True
    return message


async def test_streams_differ_in_ids_and_retry() -> None:
    """The same messages in the same order, each under an id, primed for those clients that know how."""
    async with both("auto") as (_world, sdk, ours):
        texts: list[list[Any]] = []
        for member in (sdk, ours):
            session = await member.open()
            response = await member.post(call("shout", levels=["info", "error"]), session)
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["cache-control"] == "no-cache, no-transform"
            assert response.headers["x-accel-buffering"] == "no"
            texts.append(messages(response))
            if member is ours:
                events = response.text.strip().split("\r\n\r\n")
                assert all(event.startswith("id: ") for event in events)
                assert "retry: 1000" in events[0]
                assert "data: " in events[0]
        assert texts[0] == texts[1]


async def test_older_client_gets_no_priming_event() -> None:
    """It could not parse one."""
    async with both("sse") as (_world, _sdk, ours):
        session = await ours.open(version="2025-06-18")
        response = await ours.post(call("echo", x=1), session)
        (event,) = response.text.strip().split("\r\n\r\n")
        assert json.loads(event.partition("data: ")[2])["id"] == 1


async def test_duplicate_of_running_request_is_refused() -> None:
    """The SDK starts it as well, and the two get each other's messages."""
    async with both("auto") as (world, _sdk, ours):
        session = await ours.open()
        first = asyncio.create_task(ours.post(call("wait", 7, door="d"), session))
        await world.saw("at d")
        for same in (7, "7"):
            response = await ours.post(request("ping", id=same), session)
            assert outcome(response) == Outcome(
                409,
                "application/json",
                -32600,
                "Conflict: a request with this id is still running in this session",
                named=True,
            )
        world.doors["d"].set()
        assert (await first).status_code == 200
        assert (await ours.post(request("ping", id=7), session)).status_code == 200


async def test_second_listener_takes_over() -> None:
    """The SDK refuses it; a lost connection then locks its own client out."""
    world = World()
    accept = {"accept": "text/event-stream"}
    async with Cluster(world.server, one(MemoryStore()), nodes=1) as (ours,):
        session = await ours.open()
        async with ours.stream("GET", session, **accept) as first, ours.stream("GET", session, **accept) as second:
            assert (first.status_code, second.status_code) == (200, 200)


async def test_full_store_is_said_with_delay() -> None:
    """As the SDK says it, with a time to come back."""
    world = World()
    options = {"max_sessions": 1}
    sdk = Member("sdk", world.server().streamable_http_app(max_sessions=1))  # type: ignore[arg-type]
    async with Cluster(world.server, one(MemoryStore()), nodes=2, app_options=options) as (a, b):
        await sdk.start()
        try:
            await sdk.open()
            await a.open()
            theirs, ours = await sdk.post(opening()), await b.post(opening())
        finally:
            await sdk.stop()
        assert outcome(ours) == outcome(theirs)
        assert outcome(ours).status == 503
        assert int(ours.headers["retry-after"]) >= 1
        assert "retry-after" not in theirs.headers


def test_every_difference_is_in_the_document() -> None:
    text = DOCUMENT.read_text()
    for difference in DIFFERENCES:
        assert difference.title in text
