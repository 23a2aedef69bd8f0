"""A failover to a replica that was behind: what was acknowledged and is lost is reported, never skipped over (P9)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from nonstick.stores import open_store
from nonstick.testing import FaultProxy
from tests.cluster.conftest import MakeStore
from tests.cluster.servers import opening, request
from tests.cluster.sse import getting, posting
from tests.cluster.stage import announce, call, staged, text_of, texts_of
from tests.faults.pairs import Pair, PostgresPair, ValkeyPair
from tests.faults.places import assert_unavailable, counting, repeated, step, steps, up_to

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("impatient")]


@pytest.fixture(params=[ValkeyPair, pytest.param(PostgresPair, marks=pytest.mark.slow)])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    kind: type[Pair] = request.param
    async with kind() as pair:
        yield pair


@pytest.fixture
async def door(pair: Pair) -> AsyncIterator[FaultProxy]:
    """How all nodes reach the primary, whichever that is."""
    async with FaultProxy(pair.primary.url) as door:
        yield door


@pytest.fixture
def make(door: FaultProxy) -> MakeStore:
    return lambda: open_store(door.url)


async def fail_over(pair: Pair, door: FaultProxy) -> None:
    await door.cut()
    await pair.fail_over()
    await door.lead_to(pair.primary.url)
    await door.heal()


async def test_failover_reports_lost_acknowledged_events(pair: Pair, door: FaultProxy, make: MakeStore) -> None:
    """P9: whoever had a place in what is lost, and whoever had one before it, gets one error, and no gap."""
    handled: list[str] = []
    async with staged(make, window=0.1) as (stage, a, b, c):
        counting(stage, handled)
        session = await a.open()
        async with posting(a, session, steps(5)) as stream:
            step(stage, 1)
            assert text_of(await stream.message()) == "1"
            before = stream.last_id
            await pair.replicated()
            pair.hold_back()
            step(stage, 2, 3)
            assert texts_of([await stream.message(), await stream.message()]) == ["2", "3"]
            lost = stream.last_id
            await fail_over(pair, door)
            step(stage, 4)
            # The other two must not come: what they follow is lost.
            (end,) = await stream.rest()
            assert end["id"] == 1
            assert end["error"]["data"] == {"reason": "stream_lost", "retrySafe": False}
        assert handled == ["began", "cancelled"]
        for member, place in ((b, before), (c, lost)):
            async with getting(member, session, place) as resumed:
                (told,) = await resumed.rest()
                assert told["error"] == end["error"]
        stage.open("end")
        async with posting(b, session, steps(3, 2)) as again:
            assert texts_of(await again.rest()) == up_to(3)


async def test_failover_reports_streams_and_sessions_lost(pair: Pair, door: FaultProxy, make: MakeStore) -> None:
    """P9: a lost POST stream answers its resume with one error; only a session that is lost itself gets 404."""
    async with staged(make, window=0.1) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        await pair.replicated()
        pair.hold_back()
        young = await b.open()
        step(stage, 1, 2)
        stage.open("end")
        async with posting(a, session, steps(2)) as stream:
            first = await stream.message()
            seen = stream.last_id
            assert texts_of([first, *await stream.rest()]) == up_to(2)
        await door.cut()
        assert_unavailable(await c.post(opening()))
        await fail_over(pair, door)
        await repeated(lambda: c.post(request("ping"), session), until=200, allowed=[503])
        async with getting(c, session, seen) as resumed:
            (end,) = await resumed.rest()
            assert end["error"]["data"]["reason"] == "stream_lost"
        for member in (a, b, c):
            await repeated(lambda: member.post(request("ping"), young), until=404, allowed=[503])  # noqa: B023
        assert (await a.open()).id


async def test_standalone_stream_survives_a_lossy_failover(pair: Pair, door: FaultProxy, make: MakeStore) -> None:
    """P3, P9: nothing comes twice; a log line says that events are lost."""
    async with staged(make, window=0.1) as (stage, a, b, c):

        @stage.tool
        async def tell(ctx: object, args: dict[str, str]) -> str:
            await announce(ctx, args["text"])  # type: ignore[arg-type]
            return "told"

        session = await a.open()
        async with getting(b, session) as listening:
            await a.post(call("tell", 1, text="1"), session)
            assert text_of(await listening.message()) == "1"
            await pair.replicated()
            pair.hold_back()
            await a.post(call("tell", 2, text="2"), session)
            assert text_of(await listening.message()) == "2"
            await fail_over(pair, door)
            await repeated(lambda: c.post(call("tell", 3, text="3"), session), until=200, allowed=[503])
            assert text_of(await listening.message()) == "3"
            lost = listening.last_id
        async with getting(c, session, lost) as listening:
            await a.post(call("tell", 4, text="4"), session)
            assert text_of(await listening.message()) == "4"
