"""What a session may cost is bounded, and when it is over nothing of it is left."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from typing import Any

import mcp_types as types
import pytest

from nonstick.core.events import Kind, kind_of
from nonstick.core.jsonrpc import LONGEST_ID
from nonstick.core.names import session_key
from nonstick.log.cluster_log import CLUSTER_KEY
from nonstick.log.follow import Follower, Subscription
from nonstick.session.exchange import Exchange
from nonstick.session.live import LiveSession as View
from nonstick.session.reader import Reader
from nonstick.store import MAX_CANCELS, STANDALONE
from nonstick.testing.cluster import HEADERS, Member, Session
from tests.cluster.conftest import MakeStore
from tests.cluster.sse import getting, posting
from tests.cluster.stage import (
    Context,
    Stage,
    accept,
    announce,
    ask,
    call,
    cancel,
    eventually,
    node_of,
    notification,
    say,
    staged,
    text_of,
    texts_of,
)

pytestmark = pytest.mark.anyio


def talking(stage: Stage) -> None:
    """Tools that say or announce 0, 1, 2 …, each padded to `size`."""

    @stage.tool
    async def count(ctx: Context, arguments: dict[str, Any]) -> str:
        for number in range(arguments["count"]):
            await say(ctx, f"{number}" + " " * arguments.get("size", 0))
        if door := arguments.get("door"):
            stage.open(f"at {door}")
            await stage.door(door)
        return "done"

    @stage.tool
    async def tell(ctx: Context, arguments: dict[str, Any]) -> str:
        for number in range(arguments["count"]):
            await announce(ctx, f"{number}")
        return "told"


def dropped(stage: Stage) -> int:
    return sum(node_of(member).services.logs.trimming.dropped for member in stage.cluster)


# ---- the log


async def test_only_finished_streams_are_dropped(make_store: MakeStore) -> None:
    """P10: nor what no listener has read."""
    async with staged(make_store, max_log_events=40) as (stage, a, b, c):
        talking(stage)
        session = await a.open()
        await a.post(call("tell", 1, count=5), session)
        async with posting(b, session, call("count", 2, count=5, door="end")) as running:
            first = (await running.event()).id
            await stage.reached("at end")
            finished = []
            for number in range(20):
                async with posting(c, session, call("count", number + 10, count=3)) as stream:
                    finished.append((await stream.event()).id)
                    await stream.rest()

            async def small() -> bool:
                return len(await stage.log(session)) <= 40

            await eventually(small)
            async with getting(a, session, finished[0]) as gone:
                assert "error" in (await gone.rest())[0]
            async with getting(a, session, finished[-1]) as kept:
                assert texts_of(await kept.rest()) == ["0", "1", "2", "done"]
            async with getting(a, session, first) as resumed:
                assert texts_of([await resumed.message() for _ in range(5)]) == ["0", "1", "2", "3", "4"]
                stage.open("end")
                assert texts_of(await resumed.rest()) == ["done"]
        async with getting(c, session) as standalone:
            assert texts_of([await standalone.message() for _ in range(5)]) == ["0", "1", "2", "3", "4"]
        assert dropped(stage) == 0


async def test_standalone_stream_counts_dropped_messages(make_store: MakeStore) -> None:
    """P10: when nobody reads; counted in a metric."""
    async with staged(make_store, max_log_events=40) as (stage, a, b, c):
        talking(stage)
        session = await a.open()
        await b.post(call("tell", count=100), session)

        async def small() -> bool:
            return len(await stage.log(session)) <= 40

        await eventually(small)
        left = len(await stage.log(session))
        await eventually(lambda: dropped(stage) == 100 - left)
        async with getting(c, session) as standalone:
            texts = [text_of(await standalone.message()) for _ in range(left)]
        assert texts == [f"{number}" for number in range(100 - left, 100)]


async def test_bytes_of_log_are_bounded(make_store: MakeStore) -> None:
    """P10."""
    async with staged(make_store, max_log_bytes=20_000) as (stage, a, b, c):
        talking(stage)
        session = await a.open()
        for number in range(10):
            async with posting((a, b, c)[number % 3], session, call("count", number, count=5, size=1000)) as stream:
                assert len(await stream.rest()) == 6

        async def small() -> bool:
            return sum(len(event.data) for event in await stage.log(session)) <= 20_000

        await eventually(small)


async def test_overfull_stream_ends_with_an_error(make_store: MakeStore) -> None:
    """P10: unfinished streams are not trimmed, so one that never ends is ended."""
    async with staged(make_store, max_log_events=40) as (stage, a, b, c):
        talking(stage)

        @stage.tool
        async def endless(ctx: Context, arguments: dict[str, Any]) -> str:
            try:
                while True:
                    await say(ctx, "more")
            finally:
                stage.open("stopped")

        session = await a.open()
        # Its view stays on this node meanwhile, as that of a client that keeps a stream open does.
        async with getting(b, session) as standalone:
            await standalone.event()
            async with posting(b, session, call("endless", 3)) as stream:
                *said, error = await stream.rest()
            assert 40 < len(said) <= 100
            assert error["id"] == 3
            assert "full" in error["error"]["message"]
            await stage.reached("stopped")

            async def small() -> bool:
                return len(await stage.log(session)) <= 40

            await eventually(small)
            for member in (b, c):
                async with posting(member, session, call("count", 4, count=3)) as stream:
                    assert texts_of(await stream.rest()) == ["0", "1", "2", "done"]


async def test_what_clients_send_is_trimmed_too(memory: MakeStore) -> None:
    """P10: replies, progress and cancels are in the log, and have no reader that must be waited for."""
    async with staged(memory, max_log_events=40) as (stage, a, b, c):

        @stage.tool
        async def chat(ctx: Context, arguments: dict[str, Any]) -> str:
            for _ in range(20):
                await ask(ctx)
            return "done"

        session = await a.open()
        for number in range(100):
            await a.post(cancel(f"no such {number}"), session)
        async with posting(b, session, call("chat", "chat")) as stream:
            for _ in range(20):
                await c.post(accept(await stream.message()), session)
            assert texts_of(await stream.rest()) == ["done"]

        async def small() -> bool:
            return len(await stage.log(session)) <= 40

        await eventually(small)
        assert dropped(stage) == 0  # none of them was a message to the client


# ---- requests


async def test_too_many_requests_get_429(memory: MakeStore) -> None:
    """P10: with when to come back; and there is room again when one has ended."""
    async with staged(memory, max_streams=2, window=0.02) as (stage, a, b, _):
        talking(stage)
        session, other = await a.open(), await a.open()
        async with (
            posting(b, session, call("count", 1, count=0, door="one")) as first,
            posting(b, session, call("count", 2, count=0, door="two")) as second,
        ):
            await stage.reached("at one")
            await stage.reached("at two")
            refused = await b.post(call("count", 3, count=0), session)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert "error" in refused.json()
            assert text_of((await b.post(call("count", 3, count=0), other)).json()) == "done"
            stage.open("one")
            await first.outcome()
            await eventually(lambda: sum(len(s.exchanges) for s in node_of(b).sessions.values()) == 1)
            assert text_of((await b.post(call("count", 3, count=0), session)).json()) == "done"
            stage.open("two")
            await second.outcome()


async def test_running_requests_id_is_refused_again(memory: MakeStore) -> None:
    """P3: a cancel or an answer would be for both."""
    async with staged(memory, window=0.02) as (stage, a, b, _):
        talking(stage)
        session = await a.open()
        async with posting(b, session, call("count", 7, count=0, door="end")) as stream:
            await stage.reached("at end")
            assert (await b.post(call("count", "7", count=0), session)).status_code == 409
            stage.open("end")
            assert text_of(await stream.outcome()) == "done"


async def test_too_many_notifications_get_429(memory: MakeStore) -> None:
    """P10: their handlers run in the background. A cancel takes effect all the same (P5)."""
    async with staged(memory, max_streams=2, window=0.02) as (stage, a, b, _):
        talking(stage)
        handled: list[int] = []

        async def handle(ctx: Context, params: types.NotificationParams) -> None:
            handled.append(1)
            await stage.door("end")
            handled.remove(1)

        for member in (a, b):
            member.app.manager.app.add_notification_handler("notifications/x", types.NotificationParams, handle)
        session, other = await a.open(), await a.open()
        async with posting(b, session, call("count", 7, count=0, door="never")) as stream:
            await stage.reached("at never")
            for _ in range(2):
                assert (await b.post(notification("notifications/x"), session)).status_code == 202
            await eventually(lambda: len(handled) == 2)
            refused = await b.post(notification("notifications/x"), session)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert len(handled) == 2
            await b.post(cancel(7), session)
            assert "cancelled" in text_of(await stream.outcome())
        assert (await b.post(notification("notifications/x"), other)).status_code == 202
        await eventually(lambda: len(handled) == 3)
        stage.open("end")
        await eventually(lambda: not handled)
        assert (await b.post(notification("notifications/x"), session)).status_code == 202


# ---- the record


async def test_early_cancels_do_not_fill_records(make_store: MakeStore) -> None:
    """P10: however many they are, and however long their ids. The latest still count (P5)."""
    async with staged(make_store) as (stage, *members):
        talking(stage)
        session = await members[0].open()
        names = [f"{number}" + "x" * 1_000 * (number % 10 == 0) for number in range(MAX_CANCELS + 60)]
        for number, name in enumerate(names):
            assert (await members[number % 3].post(cancel(name), session)).status_code == 202
        cancels = (await stage.store.load(session_key(session.id))).cancels
        assert len(cancels) == MAX_CANCELS
        assert max(map(len, cancels)) <= 64
        long = max(names[-20:], key=len)
        for late in (long, names[-1]):
            answer = await members[1].post(call("count", late, count=0), session)
            assert answer.json()["id"] == late
            assert "cancelled" in text_of(answer.json())
        other = await members[1].post(call("count", long + "x", count=0), session)
        assert text_of(other.json()) == "done"


async def test_request_with_long_id_is_cancelled(memory: MakeStore) -> None:
    """P5: its key is short on both nodes."""
    async with staged(memory, window=0.02) as (stage, a, b, c):
        talking(stage)
        session = await a.open()
        name = "x" * LONGEST_ID
        async with posting(b, session, call("count", name, count=0, door="never")) as stream:
            await stage.reached("at never")
            await c.post(cancel(name), session)
            outcome = await stream.outcome()
        assert outcome["id"] == name
        assert "cancelled" in text_of(outcome)


# ---- slow readers


class Unread:
    """A client that posts or gets and then reads nothing."""

    def __init__(self, member: Member, method: str, session: Session, message: Any = None) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect(("127.0.0.1", member.port))
        self.socket.setblocking(False)
        body = b"" if message is None else json.dumps(message).encode()
        headers = {**HEADERS, **session.headers, "host": f"127.0.0.1:{member.port}", "content-length": f"{len(body)}"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.socket.sendall(f"{method} /mcp HTTP/1.1\r\n{lines}\r\n".encode() + body)

    async def first_bytes(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.socket, 2048)

    def __enter__(self) -> Unread:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


async def test_stalled_client_is_cut_and_resumes(make_store: MakeStore) -> None:
    """P10: after `send_timeout`; it holds up its own request until then, and nobody else's."""
    async with staged(make_store, send_timeout=0.5, max_log_bytes=64 * 1024 * 1024) as (stage, a, b, c):
        talking(stage)

        @stage.tool
        async def flood(ctx: Context, arguments: dict[str, Any]) -> str:
            for number in range(120):
                stage.open(f"flood {number}")
                await say(ctx, f"{number}" + " " * 100_000)
            stage.open("flooded")
            return "done"

        session = await a.open()
        with Unread(b, "POST", session, call("flood")) as client:
            head = await client.first_bytes()
            while b"\nid: " not in head or b"\r\n" not in head.split(b"\nid: ", 1)[1]:
                head += await client.first_bytes()
            first = head.split(b"\nid: ", 1)[1].split(b"\r\n", 1)[0].decode()
            await stage.reached("flood 1")
            async with posting(b, session, call("count", 2, count=3)) as other:
                assert texts_of(await other.rest()) == ["0", "1", "2", "done"]
            await stage.reached("flooded")
            async with getting(c, session, first) as resumed:
                texts = [text_of(message).strip() for message in await resumed.rest()]
            assert texts == [*(f"{number}" for number in range(120)), "done"]


async def test_stalled_listener_loses_nothing(make_store: MakeStore) -> None:
    """P10, P3."""
    async with staged(make_store, send_timeout=0.5, max_log_bytes=64 * 1024 * 1024) as (stage, a, b, c):

        @stage.tool
        async def flood(ctx: Context, arguments: dict[str, Any]) -> str:
            for number in range(120):
                await announce(ctx, f"{number}" + " " * 100_000)
            return "done"

        session = await a.open()
        with Unread(b, "GET", session) as client:
            await client.first_bytes()
            # A listener holds nobody up: what it does not take waits in the log.
            assert (await c.post(call("flood"), session)).status_code == 200
            await eventually(lambda: not node_of(b).services.readers)

            async def left() -> bool:
                return Kind.LEFT in await stage.kinds(session)

            await eventually(left)
            (read,) = [
                json.loads(event.data[2:])["read"]
                for event in await stage.log(session)
                if kind_of(event.data) is Kind.LEFT
            ]
            messages = [
                event
                for event in await stage.log(session)
                if event.stream == STANDALONE and kind_of(event.data) is Kind.MESSAGE
            ]
            async with getting(c, session) as standalone:
                for event in messages:
                    if event.position > read:
                        message = await standalone.message()
                        assert message == json.loads(event.data[2:])
                assert 0 < sum(event.position > read for event in messages) < 120


# ---- nothing is left


def alive(*kinds: type) -> list[object]:
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, kinds)]


@pytest.mark.slow
async def test_idle_sessions_cost_a_node_nothing(memory: MakeStore) -> None:
    """P10: of five hundred sessions that were used in every way no task is left, and soon no object; they live on."""
    async with staged(memory, window=0.01) as (stage, a, b, c):
        # Each node follows the cluster log.
        await eventually(lambda: len(alive(Subscription)) >= 3)
        before = alive(View, Exchange, Follower, Subscription, Reader)
        talking(stage)

        @stage.tool
        async def name(ctx: Context, arguments: dict[str, Any]) -> str:
            return str((await ask(ctx))["content"]["name"])

        members = (a, b, c)

        async def use(number: int) -> None:
            here, there, yonder = (members[(number + n) % 3] for n in range(3))
            session = await here.open()
            match number % 5:
                case 0:
                    assert (await there.post(call("count", count=0), session)).status_code == 200
                case 1:
                    async with posting(there, session, call("name")) as stream:
                        await yonder.post(accept(await stream.message()), session)
                        await stream.rest()
                case 2:
                    async with getting(there, session) as standalone:
                        await yonder.post(call("tell", count=1), session)
                        await standalone.message()
                case 3:
                    await there.post(cancel(1), session)
                    assert "error" in (await yonder.post(call("count", count=0), session)).json()
                case _:
                    async with posting(there, session, call("count", count=1)) as stream:
                        await stream.event()
                    async with getting(yonder, session, stream.last_id) as resumed:
                        await resumed.rest()
                    await here.delete(session)

        async def warm_up() -> None:
            for number in range(10):
                await use(number)

        await warm_up()
        await settled(members)
        tasks = working_tasks()
        gate = asyncio.Semaphore(20)

        async def one_of_many(number: int) -> None:
            async with gate:
                await use(number)

        await asyncio.gather(*(one_of_many(number) for number in range(500)))
        await settled(members)
        assert working_tasks() <= tasks
        # The latest views are parked. Two minutes after their last request, which pass here, nothing is left of them.
        for member in members:
            views = node_of(member).sessions
            assert len(views.parked) <= 256
            views.age()
            views.age()
        # A timer that was cancelled keeps the context of its task until its time.
        await eventually(lambda: len(alive(View, Exchange, Follower, Subscription, Reader)) == len(before))
        for member in members:
            assert node_of(member).services.readers == set()


def working_tasks() -> set[str]:
    """What nonstick's tasks are doing."""
    tasks = (task for task in asyncio.all_tasks() if task.get_name() != f"follow {CLUSTER_KEY}")
    names = (getattr(task.get_coro(), "__qualname__", "") for task in tasks)
    return {
        name
        for name in names
        if name.split(".")[0] in ("Exchange", "Session", "Follower", "Reader", "StandaloneConnection")
    }


async def settled(members: tuple[Member, ...]) -> None:
    """Returns once no node holds anything for a session."""
    await eventually(
        lambda: not working_tasks() and not any(node_of(m).sessions or node_of(m).services.readers for m in members)
    )
