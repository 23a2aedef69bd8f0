"""The store's server dies and comes back: with its data nothing is lost, without them every session is (P9)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.cluster.servers import opening, request
from tests.cluster.sse import getting, posting
from tests.cluster.stage import call, say, staged, text_of, texts_of
from tests.faults.places import Place, asked, assert_unavailable, counting, repeated, step, steps, up_to

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("impatient")]


async def test_restart_with_data_loses_nothing(place: Place) -> None:
    """P9: never 404; a stream that runs goes on, on its own connection and on another node; no node is restarted."""
    async with staged(place.make, window=0.1) as (stage, a, b, c):
        counting(stage)
        session = await a.open()
        async with posting(a, session, steps(4)) as stream:
            step(stage, 1)
            assert text_of(await stream.message()) == "1"
            seen = stream.last_id
            place.server.kill()
            step(stage, 2)
            for answer in await asked(b, session):
                assert_unavailable(answer)
            place.server.start()
            step(stage, 3, 4)
            stage.open("end")
            assert texts_of(await stream.rest()) == up_to(4, 2)
        await repeated(lambda: c.post(request("ping"), session), until=200, allowed=[503])
        async with getting(c, session, seen) as resumed:
            assert texts_of(await resumed.rest()) == up_to(4, 2)


@pytest.mark.parametrize("place", ["valkey", pytest.param("postgres", marks=pytest.mark.slow)], indirect=True)
async def test_restart_without_data_ends_every_session(place: Place) -> None:
    """P9, P15: 503 for the grace period, then 404, which tells clients to open another; handlers are cancelled."""
    async with staged(place.make, window=0.1) as (stage, a, b, c):
        handled: list[str] = []
        counting(stage, handled)
        session = await a.open()
        async with posting(a, session, steps(4)) as stream, getting(b, session) as listening:
            step(stage, 1)
            assert text_of(await stream.message()) == "1"
            place.server.restart(keep_data=False)
            await repeated(lambda: b.post(opening()), until=200, allowed=[503])
            for member in (a, b, c):
                await repeated(lambda: member.post(request("ping"), session), until=404, allowed=[503])  # noqa: B023
            assert await stream.rest() == []
            assert await listening.rest() == []
        assert handled == ["began", "cancelled"]
        again = await b.open()
        step(stage, 2)
        stage.open("end")
        async with posting(c, again, steps(2)) as stream:
            assert texts_of(await stream.rest()) == up_to(2)


STEPS = 25


@pytest.mark.parametrize("place", ["valkey", pytest.param("postgres", marks=pytest.mark.slow)], indirect=True)
async def test_kill_during_appends_loses_nothing(place: Place) -> None:
    """P3, P9: nor doubles: appends whose outcome nobody knows are repeated as they were, and written once."""
    async with staged(place.make, window=0.1) as (stage, *members):

        @stage.tool
        async def run(ctx: Any, args: dict[str, Any]) -> str:
            for number in range(1, STEPS + 1):
                await say(ctx, str(number))
                if number == 5:
                    stage.open(f"{args['name']} runs")
            return "done"

        session = await members[0].open()
        async with asyncio.timeout(60):

            async def use(name: int) -> None:
                async with posting(members[name % 3], session, call("run", name, name=name)) as stream:
                    first = await stream.message()
                    seen = stream.last_id
                    assert texts_of([first, *await stream.rest()]) == up_to(STEPS)
                await repeated(
                    lambda: members[name % 3].post(request("ping", id=f"p{name}"), session), until=200, allowed=[503]
                )
                async with getting(members[(name + 1) % 3], session, seen) as resumed:
                    assert texts_of(await resumed.rest()) == up_to(STEPS, 2)

            users = [asyncio.create_task(use(name)) for name in range(6)]
            for name in range(6):
                await stage.reached(f"{name} runs")
            place.server.kill()
            place.server.start()
            await asyncio.gather(*users)
