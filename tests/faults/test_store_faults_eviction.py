"""A server that evicts what it should keep (`maxmemory-policy` is not `noeviction`): the loss is reported (P9)."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from typing import Any

import pytest
import redis

from nonstick.core.names import session_key
from nonstick.testing import ValkeyServer
from nonstick.testing.cluster import Session
from tests.cluster.servers import messages, request
from tests.cluster.sse import getting, posting
from tests.cluster.stage import Stage, accept, announce, ask, call, say, staged, text_of, texts_of
from tests.faults.places import Place, counting, step, steps

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("place", ["valkey"], indirect=True)]


def evict(place: Place, session: Session, part: str) -> None:
    """Takes one of the session's keys: `r`, its record; `w`, its books; `l`, its log."""
    assert isinstance(place.server, ValkeyServer)
    with redis.Redis(port=place.server.port, protocol=2) as admin:
        assert admin.delete(f"{place.name}:{{{session_key(session.id)}}}:{part}") == 1


async def test_evicted_record_is_a_lost_session(place: Place) -> None:
    """P9: 404 on every node; streams end and handlers are cancelled."""
    async with staged(place.make, window=0.1) as (stage, a, b, c):
        handled: list[str] = []
        counting(stage, handled)
        session = await a.open()
        async with posting(a, session, steps(2)) as stream:
            step(stage, 1)
            assert text_of(await stream.message()) == "1"
            evict(place, session, "r")
            for member in (a, b, c):
                assert (await member.post(request("ping"), session)).status_code == 404
            assert await stream.rest() == []
        assert handled == ["began", "cancelled"]


def talking(stage: Stage) -> None:
    @stage.tool
    async def tell(ctx: Any, args: dict[str, Any]) -> str:
        await announce(ctx, args["text"])
        return "told"

    @stage.tool
    async def name(ctx: Any, args: dict[str, Any]) -> str:
        return str((await ask(ctx))["content"]["name"])


@pytest.mark.parametrize(("part", "own"), [("w", []), ("l", ["2", "done"])], ids=["books", "log"])
async def test_session_outlives_its_evicted_log(place: Place, part: str, own: list[str]) -> None:
    """P9: whoever resumes the stream that ran gets one error. What comes afterwards is as ever."""
    async with staged(place.make, window=0.1) as (stage, a, b, c):
        counting(stage)
        talking(stage)
        session = await a.open(capabilities={"elicitation": {}})
        async with getting(b, session) as listening:
            assert text_of(messages(await a.post(call("tell", 1, text="before"), session))[-1]) == "told"
            assert text_of(await listening.message()) == "before"
            async with posting(a, session, steps(2, 2)) as stream:
                step(stage, 1)
                assert text_of(await stream.message()) == "1"
                seen = stream.last_id
                evict(place, session, part)
                step(stage, 2)
                stage.open("end")
                assert texts_of(await stream.rest()) == own
            async with getting(c, session, seen) as resumed:
                (end,) = await resumed.rest()
                assert (end["id"], end["error"]["data"]["reason"]) == (2, "stream_lost")
            assert text_of(messages(await a.post(call("tell", 3, text="after"), session))[-1]) == "told"
            assert text_of(await listening.message()) == "after"
            place_after = listening.last_id
        async with getting(c, session, place_after) as listening:
            assert text_of(messages(await a.post(call("tell", 4, text="again"), session))[-1]) == "told"
            assert text_of(await listening.message()) == "again"
        async with posting(a, session, call("name", 5)) as stream:
            assert (await b.post(accept(await stream.message()), session)).status_code == 202
            assert texts_of(await stream.rest()) == ["Ada"]


async def test_evicted_books_are_reported_to_clients(place: Place) -> None:
    """P9: also to one that was up to date: nobody knows that its stream is open, so nobody can end it."""
    async with staged(place.make, window=0.1) as (stage, a, b, _c):
        counting(stage)
        session = await a.open()
        async with posting(a, session, steps(1)) as stream:
            step(stage, 1)
            assert text_of(await stream.message()) == "1"
            async with getting(b, session, stream.last_id) as resumed:
                evict(place, session, "w")
                (end,) = await resumed.rest()
                assert end["error"]["data"]["reason"] == "stream_lost"
            stage.open("end")
            assert await stream.rest() == []


SESSIONS = 40


@pytest.mark.slow
async def test_evicting_server_leaves_no_silent_gap(place: Place) -> None:
    """P9: whatever the server evicts, no resume skips over a gap or waits for ever."""
    with ValkeyServer() as server:
        pressed = Place("valkey", server)
        async with staged(pressed.make, window=0.1) as (stage, a, b, c):

            @stage.tool
            async def talk(ctx: Any, args: dict[str, Any]) -> str:
                for number in range(4):
                    await say(ctx, f"{number} {os.urandom(4000).hex()}")
                return "done"

            async def use() -> tuple[Session, str | None, list[str]]:
                session = await a.open()
                async with posting(a, session, call("talk")) as stream:
                    first = await stream.message()
                    return session, stream.last_id, texts_of(await stream.rest()) if first else []

            used = await asyncio.gather(*(use() for _ in range(SESSIONS)))
            with redis.Redis(port=server.port, protocol=2) as admin:
                room = int(admin.info("memory")["used_memory"]) - 50_000
                admin.config_set("maxmemory-policy", "allkeys-random")
                admin.config_set("maxmemory", room)
                admin.set("pressure", b"x" * 200_000)
                admin.config_set("maxmemory", 0)
            outcomes: Counter[str] = Counter()
            for session, seen, rest in used:
                answer = await b.post(request("ping"), session)
                if answer.status_code == 404:
                    outcomes["session lost"] += 1
                    continue
                assert answer.status_code == 200
                async with getting(c, session, seen) as resumed:
                    got = await resumed.rest()
                if "error" in got[-1]:
                    assert len(got) == 1
                    assert got[0]["error"]["data"]["reason"] == "stream_lost"
                    outcomes["stream lost"] += 1
                else:
                    assert texts_of(got) == rest
                    outcomes["whole"] += 1
            print(outcomes)
            assert set(outcomes) == {"session lost", "stream lost", "whole"}, outcomes
