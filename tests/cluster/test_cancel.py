"""A cancel stops its request wherever it runs, and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nonstick.core.names import session_key
from nonstick.testing.cluster import Session
from tests.cluster.conftest import MakeStore
from tests.cluster.sse import DEADLINE, getting, posting
from tests.cluster.stage import (
    Context,
    HeldStore,
    Stage,
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

CANCELLED = {"code": -32800, "message": "Request cancelled"}
"""The SDK's own answer."""


def waiting(stage: Stage) -> None:
    """A tool that says `texts`, waits for ever, and says when it is stopped."""

    @stage.tool
    async def wait(ctx: Context, arguments: dict[str, Any]) -> str:
        name = arguments.get("name", "")
        for text in arguments.get("texts", ()):
            await say(ctx, text)
        stage.open(f"running {name}".strip())
        try:
            await stage.door(f"go on {name}".strip())
        except asyncio.CancelledError:
            stage.open(f"stopped {name}".strip())
            raise
        return "done"

    @stage.tool
    async def quick(ctx: Context, arguments: dict[str, Any]) -> str:
        return "quick"


async def is_left(stage: Stage, session: Session, key: str) -> bool:
    """Whether a cancel is left in the record."""
    return key in (await stage.store.load(session_key(session.id))).cancels


@pytest.mark.parametrize("where", [0, 1, 2], ids=["from a", "on its own node", "from c"])
async def test_streamed_request_is_cancelled_from_anywhere(make_store: MakeStore, where: int) -> None:
    """P5: its handler stops, its stream ends with one error."""
    async with staged(make_store, window=0.05) as (stage, *members):
        waiting(stage)
        session = await members[0].open()
        async with posting(members[1], session, call("wait", "w", texts=["0"])) as stream:
            assert text_of(await stream.message()) == "0"
            assert (await members[where].post(cancel("w"), session)).status_code == 202
            await stage.reached("stopped")
            assert await stream.rest() == [{"jsonrpc": "2.0", "id": "w", "error": CANCELLED}]
        # A client that comes back for it gets the same.
        async with getting(members[2], session, stream.last_id) as resumed:
            assert await resumed.rest() == []


async def test_silent_request_is_cancelled_from_elsewhere(make_store: MakeStore) -> None:
    """P5: also before the window has passed: then it is stopped when it has."""
    async with staged(make_store, window=0.2) as (stage, a, b, c):
        waiting(stage)
        session = await a.open()
        async with posting(b, session, call("wait")) as stream:
            await stage.reached("running")
            assert not stream.started
            await c.post(cancel(1), session)
            await stage.reached("stopped")
            assert (await stream.outcome())["error"] == CANCELLED


async def test_silent_request_is_cancelled_late(make_store: MakeStore) -> None:
    """P5."""
    async with staged(make_store, window=0.02) as (stage, a, b, c):
        waiting(stage)
        session = await a.open()
        async with posting(b, session, call("wait")) as stream:
            await stage.reached("running")
            await stream.event()
            await c.post(cancel(1), session)
            await stage.reached("stopped")
            assert [message["error"] for message in await stream.rest()] == [CANCELLED]


async def test_json_request_is_cancelled_from_elsewhere(make_store: MakeStore) -> None:
    """P5: `answer="json"`."""
    async with staged(make_store, answer="json", window=0.02) as (stage, a, b, c):
        waiting(stage)
        session = await a.open()
        async with posting(b, session, call("wait", 5)) as stream:
            await stage.reached("running")
            await c.post(cancel(5), session)
            await stage.reached("stopped")
            assert await stream.answer() == {"jsonrpc": "2.0", "id": 5, "error": CANCELLED}


@pytest.mark.parametrize("request_id", [7, "7"])
@pytest.mark.parametrize("cancelled_id", [7, "7"])
@pytest.mark.parametrize("where", [1, 2], ids=["on its own node", "from another"])
async def test_numeric_and_string_ids_are_one(
    memory: MakeStore, request_id: Any, cancelled_id: Any, where: int
) -> None:
    """P5: as in the SDK; the answer carries the id as the request did."""
    async with staged(memory, window=0.02) as (stage, *members):
        waiting(stage)
        session = await members[0].open()
        async with posting(members[1], session, call("wait", request_id)) as stream:
            await stage.reached("running")
            await members[where].post(cancel(cancelled_id), session)
            assert await stream.outcome() == {"jsonrpc": "2.0", "id": request_id, "error": CANCELLED}


async def test_early_cancel_still_counts(make_store: MakeStore) -> None:
    """P5: it overtook it, on another node; it does its work once."""
    async with staged(make_store) as (stage, a, b, c):
        waiting(stage)
        session = await a.open()
        await c.post(cancel(3), session)
        answer = await b.post(call("wait", 3), session)
        assert answer.json() == {"jsonrpc": "2.0", "id": 3, "error": CANCELLED}
        assert "running" not in stage.marks

        async def used_up() -> bool:
            return not await is_left(stage, session, "3")

        await eventually(used_up)
        assert text_of((await b.post(call("quick", 3), session)).json()) == "quick"


async def test_cancel_during_loading_counts(make_store: MakeStore) -> None:
    """P5: the node follows the log from the head that it loaded; the handler does not even begin."""
    held: list[HeldStore] = []

    def make() -> Any:
        held.append(HeldStore(make_store(), "load", after=True))
        return held[-1]

    async with staged(make, window=0.05) as (stage, a, b, c):
        waiting(stage)

        @stage.tool
        async def mark(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("begun")
            return "done"

        session = await a.open()
        on_b = held[2]
        on_b.holding = True
        async with posting(b, session, call("mark", 3)) as stream:
            async with asyncio.timeout(DEADLINE):
                await on_b.held.wait()
            on_b.holding = False
            # Another request has its node follow the log already, and take the cancel for nobody's.
            async with posting(b, session, call("wait", 4, name="other", texts=["0"])) as other:
                await other.message()
                await eventually(lambda: _follows(b))
                await c.post(cancel(3), session)
                (held_view,) = node_of(b).sessions.values()
                await eventually(lambda: bool(held_view.inbox.cancels._recent))
                on_b.released.set()
                assert (await stream.outcome())["error"] == CANCELLED
                assert not stage.marks["begun"].is_set()

                async def used_up() -> bool:
                    return not await is_left(stage, session, "3")

                await eventually(used_up)
                stage.open("go on other")
                assert texts_of(await other.rest()) == ["done"]


def _follows(member: Any) -> bool:
    node = member.app.manager._node
    return any(session.log.follower.subscriptions for session in node.sessions.values())


async def test_cancel_racing_promotion_ends_the_stream(make_store: MakeStore) -> None:
    """P5, P3: the client learns of one stream and gets its one answer."""
    held: list[HeldStore] = []

    def make() -> Any:
        held.append(HeldStore(make_store(), "append", after=False, when=lambda _key, batch: batch.stream == -1))
        return held[-1]

    async with staged(make) as (stage, a, b, _):
        waiting(stage)
        session = await a.open()
        on_b = held[2]
        on_b.holding = True
        async with posting(b, session, call("wait", texts=["0"])) as stream:
            async with asyncio.timeout(DEADLINE):
                await on_b.held.wait()
            await b.post(cancel(1), session)
            on_b.holding = False
            on_b.released.set()
            said, error = await stream.rest()
            assert text_of(said) == "0"
            assert error["error"] == CANCELLED
        await stage.reached("stopped")


async def test_done_cancel_spares_later_requests(make_store: MakeStore) -> None:
    """P5: clients use their ids again."""
    async with staged(make_store, window=0.02) as (stage, a, b, c):
        waiting(stage)
        session = await a.open()
        async with posting(b, session, call("wait", 7)) as stream:
            await stage.reached("running")
            await c.post(cancel(7), session)
            assert (await stream.outcome())["error"] == CANCELLED

        async def used_up() -> bool:
            return not await is_left(stage, session, "7")

        await eventually(used_up)
        for member in (a, b, c):
            assert text_of((await member.post(call("quick", 7), session)).json()) == "quick"
        # Nor one that follows the log where the old cancel still is.
        async with posting(c, session, call("wait", 7, name="second")) as stream:
            await stage.reached("running second")
            await stream.event()
            await b.post(call("quick", "fence"), session)
            stage.open("go on second")
            assert texts_of(await stream.rest()) == ["done"]


async def test_old_cancel_spares_newer_request(make_store: MakeStore) -> None:
    """P5: an older request has its node read the log from before the cancel."""
    async with staged(make_store, window=0.5) as (stage, a, b, c):
        waiting(stage)
        session = await a.open()
        async with posting(b, session, call("wait", 1, name="old")) as old:
            await stage.reached("running old")
            await c.post(cancel(7), session)
            assert (await a.post(call("quick", 7), session)).json()["error"] == CANCELLED

            async def used_up() -> bool:
                return not await is_left(stage, session, "7")

            await eventually(used_up)
            async with posting(b, session, call("wait", 7, name="new")) as new:
                await stage.reached("running new")
                # The fence: what b reads after that cancel.
                await c.post(cancel(1), session)
                await stage.reached("stopped old")
                assert (await old.outcome())["error"] == CANCELLED
                stage.open("go on new")
                assert text_of(await new.outcome()) == "done"


async def test_cancel_stops_nothing_else(make_store: MakeStore) -> None:
    """P5."""
    async with staged(make_store, window=0.02) as (stage, a, b, c):
        waiting(stage)
        session, other = await a.open(), await a.open()
        async with (
            posting(b, session, call("wait", 1, name="one")) as one_,
            posting(b, session, call("wait", 2, name="two")) as two,
            posting(c, other, call("wait", 1, name="three")) as three,
        ):
            for name in ("one", "two", "three"):
                await stage.reached(f"running {name}")
            await c.post(cancel(1), session)
            assert (await one_.rest())[-1]["error"] == CANCELLED
            stage.open("go on two")
            stage.open("go on three")
            assert texts_of(await two.rest()) == ["done"]
            assert texts_of(await three.rest()) == ["done"]


async def test_cancelled_handler_takes_questions_back(make_store: MakeStore) -> None:
    """P4, P5: the client is told that nobody waits for its reply any more."""
    async with staged(make_store, window=0.02) as (stage, a, b, c):

        @stage.tool
        async def asks(ctx: Context, arguments: dict[str, Any]) -> str:
            return str(await ask(ctx))

        session = await a.open()
        async with posting(b, session, call("asks", 9)) as stream:
            request = await stream.message()
            await c.post(cancel(9), session)
            withdrawn, error = await stream.rest()
        assert withdrawn["method"] == "notifications/cancelled"
        assert withdrawn["params"]["requestId"] == request["id"]
        assert error["error"] == CANCELLED
        assert not await stage.is_pending(session, request["id"])


async def test_stubborn_handler_is_answered_as_cancelled(memory: MakeStore) -> None:
    """P5."""
    async with staged(memory, window=0.02) as (stage, a, b, c):

        @stage.tool
        async def deaf(ctx: Context, arguments: dict[str, Any]) -> str:
            stage.open("running")
            try:
                await stage.door("never")
            except asyncio.CancelledError:
                pass
            return "done all the same"

        session = await a.open()
        async with posting(b, session, call("deaf")) as stream:
            await stage.reached("running")
            await c.post(cancel(1), session)
            assert [message["error"] for message in await stream.rest()] == [CANCELLED]


@pytest.mark.parametrize(
    "params", [{}, {"requestId": None}, {"requestId": True}, {"requestId": [1]}, {"requestId": 1.5}]
)
async def test_aimless_cancel_is_acknowledged_and_dropped(memory: MakeStore, params: Any) -> None:
    """P5."""
    async with staged(memory) as (stage, a, b, _):
        session = await a.open()
        assert (await b.post(notification("notifications/cancelled", **params), session)).status_code in (202, 400)
        assert await stage.log(session) == []
