"""The network between one node and the store fails; the others reach it. 503 at that node, and nothing is lost (P9)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from nonstick.testing import FaultProxy
from nonstick.testing.cluster import Session
from tests.cluster.servers import request
from tests.cluster.sse import getting, posting
from tests.cluster.stage import Stage, staged, text_of, texts_of
from tests.faults.places import Place, asked, assert_unavailable, counting, repeated, step, steps, up_to

pytestmark = pytest.mark.anyio

Fault = Callable[[FaultProxy], Awaitable[None]]


async def cut(proxy: FaultProxy) -> None:
    """Connections are reset and refused."""
    await proxy.cut()


async def silent(proxy: FaultProxy) -> None:
    """Nothing passes, either way."""
    proxy.black_hole()


async def mute(proxy: FaultProxy) -> None:
    """What the node says does not arrive."""
    proxy.black_hole(replies=False)


async def deaf(proxy: FaultProxy) -> None:
    """What the node says is heard and executed; the answers never come."""
    proxy.black_hole(requests=False)


async def too_slow(proxy: FaultProxy) -> None:
    """2,000 ms each way: no call ends in time."""
    proxy.delay(2.0)


def _named(fault: Fault) -> str:
    return getattr(fault, "__name__", "")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "fault",
    [cut, pytest.param(silent, marks=pytest.mark.slow), pytest.param(mute, marks=pytest.mark.slow), deaf, too_slow],
    ids=_named,
)
@pytest.mark.parametrize("place", ["valkey", pytest.param("postgres", marks=pytest.mark.slow)], indirect=True)
async def test_node_cut_off_says_503(place: Place, proxy: FaultProxy, fault: Fault) -> None:
    """P3, P9: other nodes serve the session meanwhile; nothing is run twice, no step is missing or doubled."""
    handled: list[str] = []
    async with staged(place.behind(proxy, None, None), window=0.1) as (stage, a, b, c):
        counting(stage, handled)
        session = await b.open()
        async with posting(a, session, steps(4)) as stream:
            step(stage, 1)
            assert text_of(await stream.message()) == "1"
            seen = stream.last_id
            await fault(proxy)
            step(stage, 2)
            for answer in await asked(a, session):
                assert_unavailable(answer)
            assert (await b.post(request("ping", id="b"), session)).status_code == 200
            step(stage, 3)
            await proxy.heal()
            step(stage, 4)
            stage.open("end")
            assert texts_of(await stream.rest()) == up_to(4, 2)
        assert handled == ["began", "ended"]
        await repeated(lambda: a.post(request("ping"), session), until=200, allowed=[503])
        for member in (a, c):
            async with getting(member, session, seen) as resumed:
                assert texts_of(await resumed.rest()) == up_to(4, 2)


@pytest.mark.parametrize(
    ("place", "milliseconds"),
    [
        ("valkey", 50),
        pytest.param("postgres", 50, marks=pytest.mark.slow),
        pytest.param("valkey", 500, marks=pytest.mark.slow),
    ],
    indirect=["place"],
)
async def test_slow_network_breaks_nothing(place: Place, proxy: FaultProxy, milliseconds: int) -> None:
    """P9: a round trip takes twice as long as that, and is well within a call's deadline."""
    async with staged(place.behind(proxy, None, None), window=0.1) as (stage, a, b, _c):
        counting(stage)
        session = await a.open()
        # The connections are there, as in a node that has worked for a while.
        assert (await a.post(request("ping", id="before"), session)).status_code == 200
        proxy.delay(milliseconds / 1000)
        step(stage, 1, 2, 3)
        stage.open("end")
        await _whole(stage, a, b, session)
        await proxy.heal()


async def _whole(stage: Stage, a: Any, b: Any, session: Session) -> None:
    async with posting(a, session, steps(3)) as stream:
        first = await stream.message()
        seen = stream.last_id
        assert texts_of([first, *await stream.rest()]) == up_to(3)
    async with getting(b, session, seen) as resumed:
        assert texts_of(await resumed.rest()) == up_to(3, 2)
    answers = [await member.post(request("ping", id="after"), session) for member in (a, b)]
    assert [answer.status_code for answer in answers] == [200, 200]
