"""What is not there for a client is said clearly, and what is there for the others stays there."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.requests import Request

from nonstick.core.events import Kind, decode, kind_of
from nonstick.core.jsonrpc import LONGEST_ID, LONGEST_METHOD
from nonstick.core.names import session_key
from nonstick.http.intake import header
from nonstick.stores.memory import MemoryStore
from nonstick.testing import ManualClock
from nonstick.testing.cluster import HEADERS, Member, Session
from tests.cluster.conftest import MakeStore, one
from tests.cluster.servers import request
from tests.cluster.sse import getting, posting
from tests.cluster.stage import (
    Context,
    Stage,
    call,
    eventually,
    node_of,
    notification,
    say,
    staged,
    text_of,
    texts_of,
)
from tests.pace import unhurried

pytestmark = pytest.mark.anyio


def waiting(stage: Stage) -> None:
    """A tool that waits for a door, and one that speaks first."""

    @stage.tool
    async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
        stage.open(f"at {arguments['door']}")
        await stage.door(arguments["door"])
        return "done"

    @stage.tool
    async def speak(ctx: Context, arguments: dict[str, Any]) -> str:
        await say(ctx, "first")
        return str(await wait(ctx, arguments))

    @stage.tool
    async def quick(ctx: Context, arguments: dict[str, Any]) -> str:
        return "done"


def refused(response: Any) -> tuple[int, str, str]:
    """Status, Retry-After, message."""
    return response.status_code, response.headers["retry-after"], response.json()["error"]["message"]


# ---- places


async def test_full_node_takes_replies_and_notifications(memory: MakeStore) -> None:
    """P10: 503 with when to come back, also for `initialize`. Replies, notifications and GETs are served (P4, P5)."""
    async with staged(memory, max_streams_per_node=2, window=0.02) as (stage, a, b, c):
        waiting(stage)
        session, other = await a.open(), await a.open()
        async with (
            posting(b, session, call("wait", 1, door="one")) as first,
            posting(b, other, call("speak", 1, door="two")) as second,
        ):
            await stage.reached("at one")
            await stage.reached("at two")
            expected = 503, "1", "This node is running as many requests as it may; try again"
            assert refused(await b.post(call("quick", 2), session)) == expected
            assert refused(await b.client.post(b.url, json=request("initialize", {}, 0), headers=HEADERS)) == expected
            assert text_of((await c.post(call("quick", 2), session)).json()) == "done"
            assert (await b.post(notification("notifications/x"), session)).status_code == 202
            async with getting(b, session) as listening:
                assert (await listening.event()).id
            stage.open("one")
            assert text_of(await first.outcome()) == "done"
            await eventually(lambda: len(node_of(b).services.requests) == 1)
            assert text_of((await b.post(call("quick", 2), session)).json()) == "done"
            stage.open("two")
            assert texts_of(await second.rest()) == ["first", "done"]
        await eventually(lambda: not len(node_of(b).services.requests))


async def test_clientless_request_keeps_its_place(memory: MakeStore) -> None:
    """P10: what runs counts, whoever waits for it."""
    async with staged(memory, max_streams_per_node=1, window=0.02) as (stage, a, b, _):
        waiting(stage)
        session = await a.open()
        async with posting(b, session, call("speak", 1, door="end")) as stream:
            await stream.message()
        assert (await b.post(call("quick", 2), session)).status_code == 503
        stage.open("end")
        await eventually(lambda: not len(node_of(b).services.requests))
        assert text_of((await b.post(call("quick", 2), session)).json()) == "done"


async def test_sessions_listeners_are_limited(memory: MakeStore) -> None:
    """P10: 429, on this node; the streams of requests are resumed all the same."""
    async with staged(memory, max_listeners=2) as (stage, a, b, c):
        waiting(stage)
        session, other = await a.open(), await a.open()
        async with posting(b, session, call("speak", 1, door="end")) as stream:
            place = (await stream.event()).id
            async with getting(b, session) as one_, getting(b, session) as two:
                await one_.event()
                await two.event()
                expected = 429, "1", "Too many streams of this session are open; close one, or wait for one to end"
                assert refused(await b.client.get(b.url, headers=accepting(session))) == expected
                async with getting(b, session, place) as resumed, getting(c, session), getting(b, other):
                    stage.open("end")
                    assert texts_of(await resumed.rest()) == ["first", "done"]
            await eventually(lambda: not len(node_of(b).listeners))
            async with getting(b, session) as again:
                await again.event()


async def test_resumptions_of_one_session_are_limited(memory: MakeStore) -> None:
    """P10: to as many as the requests that it may run."""
    async with staged(memory, max_streams=1) as (stage, a, b, c):
        waiting(stage)
        session = await a.open()
        async with posting(b, session, call("speak", 1, door="end")) as stream:
            place = (await stream.event()).id
            async with getting(c, session, place) as resumed:
                await resumed.message()
                again = await c.client.get(c.url, headers={**accepting(session), "last-event-id": place or ""})
                assert again.status_code == 429
                assert again.headers["retry-after"] == "1"
                stage.open("end")
                assert texts_of(await resumed.rest()) == ["done"]


async def test_node_full_of_streams_serves_requests(memory: MakeStore) -> None:
    """P10: GETs take no place of a request."""
    async with staged(memory, max_listeners_per_node=2) as (stage, a, b, c):
        waiting(stage)
        session, other = await a.open(), await a.open()
        async with getting(b, session) as one_, getting(b, other) as two:
            await one_.event()
            await two.event()
            expected = 503, "1", "As many streams are open on this node as it may keep; try again"
            assert refused(await b.client.get(b.url, headers=accepting(other))) == expected
            assert text_of((await b.post(call("quick", 2), session)).json()) == "done"
            async with getting(c, other) as elsewhere:
                await elsewhere.event()


async def test_clients_without_sessions_take_places_too(memory: MakeStore) -> None:
    """P10: those of 2026-07-28, whom the SDK's manager serves."""
    async with staged(memory, max_streams_per_node=1, max_listeners_per_node=1, window=0.02) as (stage, a, b, _):
        waiting(stage)
        session = await a.open()
        modern = {**HEADERS, "mcp-protocol-version": "2026-07-28", "mcp-method": "tools/list"}
        async with posting(b, session, call("wait", 1, door="end")), getting(b, session) as listening:
            await stage.reached("at end")
            await listening.event()
            for method in ("tools/list", "subscriptions/listen"):
                response = await b.client.post(b.url, json=request(method), headers={**modern, "mcp-method": method})
                assert (response.status_code, response.headers["retry-after"]) == (503, "1"), method
            stage.open("end")
        await eventually(lambda: not len(node_of(b).services.requests))
        response = await b.client.post(b.url, json=request("tools/list"), headers=modern)
        assert response.status_code != 503


def accepting(session: Session) -> dict[str, str]:
    return {**HEADERS, **session.headers, "accept": "text/event-stream"}


# ---- lengths


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (lambda over: call("quick", "i" * (LONGEST_ID + over)), "request id is longer than 1024 characters"),
        (lambda over: call("quick", 2**63 - 1 + over), "request id is longer than 63 bits"),
        (lambda over: _with_token("t" * (LONGEST_ID + over)), "progress token is longer than 1024 characters"),
        (lambda over: request("m" * (LONGEST_METHOD + over)), "method is longer than 256 characters"),
        (lambda over: notification("n" * (LONGEST_METHOD + over)), "method is longer than 256 characters"),
    ],
)
async def test_kept_names_have_a_length_limit(memory: MakeStore, message: Callable[[int], Any], what: str) -> None:
    """P10: with one character less they are taken."""
    async with staged(memory) as (stage, a, b, _):
        waiting(stage)
        session = await a.open()
        assert (await b.post(message(0), session)).status_code in (200, 202)
        response = await b.post(message(1), session)
        assert response.status_code == 400
        assert response.json()["error"] == {"code": -32600, "message": f"Bad Request: the {what}"}


def _with_token(token: str) -> Any:
    message = call("quick", 1)
    message["params"]["_meta"] = {"progressToken": token}
    return message


async def test_headers_have_a_longest_length(memory: MakeStore) -> None:
    """P10: together, and for clients of every era."""
    async with staged(memory, max_header_bytes=4096) as (stage, a, b, _):
        waiting(stage)
        session = await a.open()
        for extra in ({"x-long": "x" * 5000}, {"mcp-protocol-version": "9" * 5000}, {"last-event-id": "1." * 2500}):
            response = await b.client.post(
                b.url, json=call("quick", 1), headers={**HEADERS, **session.headers, **extra}
            )
            assert response.status_code == 431
            what = "Request Header Fields Too Large: the headers are longer than 4096 bytes"
            assert response.json()["error"]["message"] == what
        assert text_of((await b.post(call("quick", 1), session)).json()) == "done"


async def test_log_keeps_no_unneeded_arguments(make_store: MakeStore) -> None:
    """P10, P13: unless `reexecute` may need them."""
    for reexecute in ("never", "idempotent"):
        async with staged(make_store, window=0.02, reexecute=reexecute) as (stage, a, b, _):
            waiting(stage)
            session = await a.open()
            async with posting(b, session, call("wait", 1, door="end", secret="x" * 100_000)) as stream:
                await stage.reached("at end")
                await stream.event()
                (opened,) = [event for event in await stage.log(session) if kind_of(event.data) is Kind.OPENED]
                stage.open("end")
            kept = decode(opened.data)["request"]["params"]
            assert kept["name"] == "wait"
            assert ("arguments" in kept) == (reexecute == "idempotent")


# ---- slow senders


async def test_late_request_gets_408(memory: MakeStore) -> None:
    """P10: by the whole of it, so that a byte now and then does not help."""
    async with staged(memory, receive_timeout=0.3) as (stage, a, b, _):
        waiting(stage)
        session = await a.open()
        for extra in ({}, {"mcp-protocol-version": "2026-07-28"}):
            status, body = await trickle(b, {**HEADERS, **session.headers, **extra})
            assert status == 408
            assert body["error"]["message"] == "Request Timeout: the request did not arrive within 0.3 s"
        assert text_of((await b.post(call("quick", 1), session)).json()) == "done"


async def trickle(member: Member, headers: dict[str, str]) -> tuple[int, Any]:
    """Sends a body one byte after the other, for ever, to a node that closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", member.port)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1:{member.port}\r\n{lines}content-length: 999\r\n\r\n".encode())

    async def send() -> None:
        while True:
            writer.write(b" ")
            await asyncio.sleep(0.02)

    sending = asyncio.create_task(send())
    try:
        async with asyncio.timeout(60):
            head = await reader.readuntil(b"\r\n\r\n")
            (length,) = [int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
            body = await reader.readexactly(length)
    finally:
        sending.cancel()
        writer.close()
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)


# ---- a session that is not used


async def test_unused_session_expires_soon() -> None:
    """P10: after `unconfirmed_lifetime`. What it then gets is what every expired session gets (P1)."""
    clock = ManualClock()
    async with staged(one(MemoryStore(clock=clock)), unconfirmed_lifetime=10.0) as (stage, a, b, c):
        waiting(stage)
        unused = await a.open(initialized=False)
        await clock.advance(10.5)
        assert (await b.post(call("quick", 1), unused)).status_code == 404
        initialized = await a.open()
        used = await a.open(initialized=False)
        failed = await a.open(initialized=False)
        assert text_of((await b.post(call("quick", 1), used)).json()) == "done"
        assert "error" in (await b.post(request("no/such"), failed)).json()
        await eventually(lambda: confirmed(stage, used))
        await clock.advance(11)
        for member in (a, b, c):
            for session in (initialized, used):
                assert text_of((await member.post(call("quick", 1), session)).json()) == "done"
            assert (await member.post(call("quick", 1), failed)).status_code == 404
        await clock.advance(1700)
        assert text_of((await c.post(call("quick", 1), initialized)).json()) == "done"
        await clock.advance(1900)
        assert (await c.post(call("quick", 1), initialized)).status_code == 404


async def confirmed(stage: Stage, session: Session) -> bool:
    return "unconfirmed" not in (await stage.store.load(session_key(session.id))).fields


@unhurried("first", 1.0, 4.0, 16.0)
async def test_first_stream_confirms_its_session(make_store: MakeStore, first: float) -> None:
    """P10: on every store; and while it runs the session does not expire."""
    async with staged(make_store, unconfirmed_lifetime=first, window=0.02) as (stage, a, b, c):
        waiting(stage)
        session = await a.open(initialized=False)
        async with posting(b, session, call("speak", 1, door="end")) as stream:
            await stream.message()
            async with getting(c, session):
                await asyncio.sleep(1.5 * first)  # longer than it had been given
            assert not await confirmed(stage, session)
            stage.open("end")
            assert texts_of(await stream.rest())[-1:] == ["done"]
        await eventually(lambda: confirmed(stage, session))
        assert text_of((await c.post(call("quick", 2), session)).json()) == "done"


async def test_short_first_lifetime_is_optional(memory: MakeStore) -> None:
    """P12: while nodes of 0.1.0, which do not know it, serve the same sessions."""
    async with staged(memory, unconfirmed_lifetime=None) as (stage, a, _, __):
        session = await a.open(initialized=False)
        assert await confirmed(stage, session)


async def test_confirming_costs_one_update(memory: MakeStore) -> None:
    """P10: the full lifetime comes with what is written anyway, and once."""
    async with staged(one(Counting()), unconfirmed_lifetime=10.0) as (stage, a, b, _):
        waiting(stage)
        store = stage.store
        assert isinstance(store, Counting)
        session = await a.open()
        for number in range(3):
            await b.post(call("quick", number), session)
        assert store.updated.count(session_key(session.id)) == 1


class Counting(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.updated: list[str] = []

    async def update(self, key: str, *args: Any, **options: Any) -> bool:
        self.updated.append(key)
        return await super().update(key, *args, **options)


# ---- what is refused leaves nothing


def requests_here() -> list[Request]:
    """All that this process has not forgotten."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Request]


async def test_refused_requests_are_forgotten(memory: MakeStore) -> None:
    """P10: an error that is raised twice would keep the frames of the first time, and the request in them."""
    async with staged(memory) as (_, a, __, ___):
        # Those of other tests in this process are not looked at.
        before = {id(request): request for request in requests_here()}
        for _ in range(3):
            assert (await a.client.post(a.url, json=call("quick", 1), headers=HEADERS)).status_code == 400
            assert (await a.client.put(a.url, headers=HEADERS)).status_code == 405

        def forgotten() -> bool:
            return all(id(request) in before for request in requests_here())

        await eventually(forgotten)


def test_first_header_counts_in_changed_scope() -> None:
    scope: dict[str, Any] = {"headers": [(b"a", b"1"), (b"a", b"2")]}
    assert (header(scope, "a"), header(scope, "b")) == ("1", None)
    assert header({**scope, "headers": [(b"a", b"3")]}, "a") == "3"
    assert header(scope, "a") == "1"
