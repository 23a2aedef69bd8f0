"""What a handler asks its client: the reply reaches it from whichever node receives it, once, from its session only."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import mcp_types as types
import pytest
from mcp.shared.exceptions import MCPError, NoBackChannelError

from nonstick import current_connection
from nonstick.core.events import Kind, draft
from nonstick.core.names import session_key
from nonstick.store import Batch
from tests.cluster.conftest import MakeStore
from tests.cluster.sse import DEADLINE, Stream, getting, posting
from tests.cluster.stage import (
    Context,
    HeldStore,
    Stage,
    accept,
    announce,
    ask,
    ask_standalone,
    call,
    node_of,
    notification,
    quiet,
    staged,
    text_of,
    texts_of,
)

pytestmark = pytest.mark.anyio


def result(request: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": request["id"], "result": result}


def failure(request: dict[str, Any], code: int, message: str, data: Any = None) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": request["id"], "error": {"code": code, "message": message, "data": data}}


def asking(stage: Stage) -> None:
    """A tool that asks for a name on its own stream and answers it, or what went wrong."""

    @stage.tool
    async def name(ctx: Context, arguments: dict[str, Any]) -> str:
        try:
            return str((await ask(ctx, **arguments))["content"]["name"])
        except MCPError as error:
            return f"{error.code} {error.message} {error.data}"


async def asked(stream: Stream, method: str = "elicitation/create") -> Any:
    """The server request that comes next."""
    while (message := await stream.message()).get("method") != method:
        pass
    return message


# ---- every kind of request


async def test_form_is_filled_through_another_node(make_store: MakeStore) -> None:
    """P4."""
    async with staged(make_store) as (stage, a, b, c):
        asking(stage)
        session = await a.open(capabilities={"elicitation": {"form": {}}})
        async with posting(b, session, call("name")) as stream:
            request = await asked(stream)
            assert request["params"]["requestedSchema"]["properties"] == {"name": {"type": "string"}}
            assert isinstance(request["id"], str)
            assert not request["id"].isnumeric()
            response = await c.post(accept(request, "Grace"), session)
            assert (response.status_code, response.text) == (202, "")
            assert texts_of(await stream.rest()) == ["Grace"]


async def test_url_is_visited_through_another_node(make_store: MakeStore) -> None:
    """P4."""
    async with staged(make_store) as (stage, a, b, c):

        @stage.tool
        async def visit(ctx: Context, arguments: dict[str, Any]) -> str:
            done = await ctx.session.elicit_url("go there", "https://example.com/", "e-1", related_request_id=1)
            return done.action

        session = await a.open(capabilities={"elicitation": {"url": {}}})
        async with posting(b, session, call("visit")) as stream:
            request = await asked(stream)
            assert request["params"]["mode"] == "url"
            await c.post(result(request, {"action": "decline"}), session)
            assert texts_of(await stream.rest()) == ["decline"]


@quiet
async def test_model_is_sampled_through_another_node(make_store: MakeStore) -> None:
    """P4."""
    async with staged(make_store) as (stage, a, b, c):

        @stage.tool
        async def sample(ctx: Context, arguments: dict[str, Any]) -> str:
            message = types.SamplingMessage(role="user", content=types.TextContent(text="hi"))
            answer = await ctx.session.create_message(  # type: ignore[deprecated,unused-ignore]
                [message], max_tokens=5, related_request_id=ctx.request_id
            )
            assert isinstance(answer.content, types.TextContent)
            return answer.content.text

        session = await a.open(capabilities={"sampling": {}})
        async with posting(b, session, call("sample")) as stream:
            request = await asked(stream, "sampling/createMessage")
            content = {"role": "assistant", "content": {"type": "text", "text": "ho"}, "model": "m"}
            await c.post(result(request, content), session)
            assert texts_of(await stream.rest()) == ["ho"]


@quiet
async def test_standalone_stream_asks_roots_and_ping(make_store: MakeStore) -> None:
    """P4: the reply reaches the handler, which is on another node than the connection and than the reply."""
    async with staged(make_store) as (stage, a, b, c):

        @stage.tool
        async def look(ctx: Context, arguments: dict[str, Any]) -> str:
            roots = await ctx.session.list_roots()  # type: ignore[deprecated,unused-ignore]
            await ctx.session.send_ping()
            return str(roots.roots[0].uri)

        session = await a.open(capabilities={"roots": {}})
        async with posting(b, session, call("look")) as stream, getting(c, session) as standalone:
            request = await asked(standalone, "roots/list")
            await a.post(result(request, {"roots": [{"uri": "file:///home"}]}), session)
            request = await asked(standalone, "ping")
            await a.post(result(request, {}), session)
            assert text_of(await stream.outcome()) == "file:///home"


async def test_early_question_waits_for_its_connection(make_store: MakeStore) -> None:
    """P4: a server request waits on the standalone stream for its reader."""
    async with staged(make_store) as (stage, a, b, c):

        @stage.tool
        async def look(ctx: Context, arguments: dict[str, Any]) -> str:
            asking = asyncio.create_task(ask_standalone("roots/list"))
            await announce(ctx, "after")
            stage.open("asked")
            return str(await asking)

        session = await a.open()
        async with posting(b, session, call("look")) as stream:
            await stage.reached("asked")
            async with getting(c, session) as standalone:
                await b.post(result(await asked(standalone, "roots/list"), {"roots": []}), session)
            assert text_of(await stream.outcome()) == "{'roots': []}"


async def test_notifications_handler_can_ask(make_store: MakeStore) -> None:
    """P4: as after `notifications/initialized`, on whichever node it came."""
    async with staged(make_store) as (_, a, b, c):
        answers: asyncio.Queue[Any] = asyncio.Queue()

        async def initialized(ctx: Context, params: Any) -> None:
            answers.put_nowait(await ask_standalone("roots/list"))

        for member in (a, b, c):
            member.app.manager.app.add_notification_handler(
                "notifications/initialized", types.NotificationParams, initialized
            )
        session = await a.open(initialized=False)
        assert (await b.post(notification("notifications/initialized"), session)).status_code == 202
        async with getting(c, session) as standalone:
            await a.post(result(await asked(standalone, "roots/list"), {"roots": []}), session)
            async with asyncio.timeout(DEADLINE):
                assert await answers.get() == {"roots": []}


# ---- what may come back


async def test_error_reply_raises_in_handler(make_store: MakeStore) -> None:
    """P4: with its code, message and data."""
    async with staged(make_store) as (stage, a, b, c):
        asking(stage)
        session = await a.open()
        async with posting(b, session, call("name")) as stream:
            await c.post(failure(await asked(stream), -1, "no", {"why": "not"}), session)
            assert texts_of(await stream.rest()) == ["-1 no {'why': 'not'}"]


async def test_the_clients_progress_reaches_the_handler(make_store: MakeStore) -> None:
    """P4: in order, from several nodes, the one where the handler runs among them."""
    async with staged(make_store) as (stage, a, b, c):
        seen: list[tuple[float, float | None, str | None]] = []
        heard = asyncio.Condition()

        async def hear(progress: float, total: float | None, message: str | None) -> None:
            async with heard:
                seen.append((progress, total, message))
                heard.notify_all()

        @stage.tool
        async def name(ctx: Context, arguments: dict[str, Any]) -> str:
            return str((await ask(ctx, on_progress=hear))["content"]["name"])

        session = await a.open()
        async with posting(b, session, call("name")) as stream:
            request = await asked(stream)
            token = request["params"]["_meta"]["progressToken"]
            expected: list[tuple[float, float | None, str | None]] = []
            for number, member in enumerate((a, c, b, c)):
                expected.append((number, 4, f"{number}"))
                progress = notification(
                    "notifications/progress", progressToken=token, progress=number, total=4, message=f"{number}"
                )
                assert (await member.post(progress, session)).status_code == 202
                async with asyncio.timeout(DEADLINE), heard:
                    await heard.wait_for(lambda: len(seen) == len(expected))
            assert seen == expected
            await c.post(accept(request), session)
            assert texts_of(await stream.rest()) == ["Ada"]


HUGE = 10**400
"""An integer that JSON has and a float has not."""


@pytest.mark.parametrize("on_own_node", [False, True])
async def test_bad_progress_spoils_no_reply(memory: MakeStore, on_own_node: bool) -> None:
    """P4: whichever node it is sent to."""
    async with staged(memory) as (stage, _, b, c):
        seen: list[tuple[float, float | None]] = []

        async def hear(progress: float, total: float | None, message: str | None) -> None:
            seen.append((progress, total))
            if progress == 2:
                stage.open("heard")

        @stage.tool
        async def name(ctx: Context, arguments: dict[str, Any]) -> str:
            return str((await ask(ctx, on_progress=hear))["content"]["name"])

        session = await b.open()
        sender = b if on_own_node else c
        async with posting(b, session, call("name")) as stream:
            request = await asked(stream)
            token = request["params"]["_meta"]["progressToken"]
            numbers = [(HUGE, 1), (-HUGE, 1), (True, 1), (1, HUGE), (1, "x"), (2, 3)]
            for progress, total in numbers:
                sent = notification("notifications/progress", progressToken=token, progress=progress, total=total)
                assert (await sender.post(sent, session)).status_code == 202
            await stage.reached("heard")
            assert seen == [(1, None), (1, None), (2, 3)]
            await c.post(accept(request), session)
            assert texts_of(await stream.rest()) == ["Ada"]


async def test_unreadable_event_spoils_no_reply(memory: MakeStore, caplog: pytest.LogCaptureFixture) -> None:
    """P4, P12: whatever wrote it. What is logged names the session by its hash only (P13)."""
    async with staged(memory) as (stage, _, b, c):
        asking(stage)
        session = await b.open()
        async with posting(b, session, call("name")) as stream:
            request = await asked(stream)
            bodies = [b"not JSON", b"[]", b"{}", b'{"progressToken":"%s"}' % request["id"].encode()]
            bad = [draft(kind, body) for kind in (Kind.REPLY, Kind.PROGRESS, Kind.CANCEL) for body in bodies]
            await stage.store.append(session_key(session.id), Batch(bad))
            await c.post(accept(request), session)
            assert texts_of(await stream.rest()) == ["Ada"]
        told = [record for record in caplog.records if "passed over" in record.message]
        assert len(told) == len(bad)
        assert session.id not in caplog.text


async def test_concurrent_requests_get_own_replies(make_store: MakeStore) -> None:
    """P4: in any order, through any node."""
    async with staged(make_store) as (stage, *members):
        asking(stage)
        session = await members[0].open()
        requests: dict[int, dict[str, Any]] = {}
        all_asked = asyncio.Event()

        async def run(number: int) -> None:
            async with posting(members[number % 3], session, call("name", number)) as stream:
                requests[number] = await asked(stream)
                if len(requests) == 12:
                    all_asked.set()
                assert texts_of(await stream.rest()) == [f"{number}"]

        async with asyncio.TaskGroup() as group:
            for number in range(12):
                group.create_task(run(number))
            async with asyncio.timeout(DEADLINE):
                await all_asked.wait()
            for number in reversed(range(12)):
                await members[(number + 1) % 3].post(accept(requests[number], f"{number}"), session)


async def test_reply_counts_after_resuming_elsewhere(make_store: MakeStore) -> None:
    """P4: the connection breaks after the question; the client reads it again on another node and answers there."""
    async with staged(make_store) as (stage, a, b, c):
        asking(stage)
        session = await a.open()
        async with posting(b, session, call("name")) as stream:
            first = (await stream.event()).id
            request = await asked(stream)
        async with getting(c, session, first) as resumed:
            assert await asked(resumed) == request
            await a.post(accept(request), session)
            assert texts_of(await resumed.rest()) == ["Ada"]


# ---- time-outs


async def test_time_out_leaves_nothing_behind(make_store: MakeStore) -> None:
    """P4: the handler gets an error, the client a cancel on the same stream, the pending set is clean."""
    async with staged(make_store) as (stage, a, b, c):
        asking(stage)
        session = await a.open()
        async with posting(b, session, call("name", timeout=0.05)) as stream:
            request = await asked(stream)
            cancelled, answer = await stream.rest()
        assert cancelled["method"] == "notifications/cancelled"
        assert cancelled["params"]["requestId"] == request["id"]
        assert text_of(answer).startswith(f"{types.REQUEST_TIMEOUT} ")
        assert not await stage.is_pending(session, request["id"])
        before = len(await stage.log(session))
        assert (await c.post(accept(request), session)).status_code == 202
        assert len(await stage.log(session)) == before


@pytest.mark.parametrize("written", [False, True], ids=["before it counts", "when it counts"])
async def test_late_reply_counts_at_most_once(make_store: MakeStore, written: bool) -> None:
    """P4: the handler goes on either way, and nothing stays pending."""
    held: list[HeldStore] = []

    def make() -> Any:
        held.append(HeldStore(make_store(), "append", after=written, when=lambda _key, batch: bool(batch.settle)))
        return held[-1]

    async with staged(make) as (stage, a, b, c):
        asking(stage)
        on_c = held[3]
        for seconds in (0.2, 2.0, 20.0):
            session, began = await a.open(), asyncio.get_running_loop().time()
            on_c.holding, on_c.held, on_c.released = False, asyncio.Event(), asyncio.Event()
            async with posting(b, session, call("name", timeout=seconds)) as stream:
                request = await asked(stream)
                on_c.holding = True
                replying = asyncio.create_task(c.post(accept(request), session))
                async with asyncio.timeout(DEADLINE):
                    await on_c.held.wait()
                in_time = asyncio.get_running_loop().time() - began < seconds
                answer = (await stream.rest())[-1]
                on_c.released.set()
                assert (await replying).status_code == 202
            if in_time:
                break
        else:
            pytest.fail("no reply was on its way before the handler's time was over")
        assert text_of(answer) == "Ada" if written else text_of(answer).startswith(f"{types.REQUEST_TIMEOUT} ")
        assert (await stage.kinds(session)).count(Kind.REPLY) == (1 if written else 0)
        assert not await stage.is_pending(session, request["id"])


async def test_returning_client_can_still_answer(make_store: MakeStore) -> None:
    """P4: nobody but the handler gives up."""
    async with staged(make_store) as (stage, a, b, c):
        asking(stage)
        session = await a.open()
        async with posting(b, session, call("name")) as stream:
            request = await asked(stream)
        assert (await c.post(accept(request), session)).status_code == 202
        async with getting(a, session, stream.last_id) as resumed:
            assert texts_of(await resumed.rest()) == ["Ada"]


async def test_end_of_session_ends_the_waiting(make_store: MakeStore) -> None:
    """P6: a handler that shields itself from cancellation still does not wait for ever."""
    async with staged(make_store) as (stage, a, b, c):

        @stage.tool
        async def stubborn(ctx: Context, arguments: dict[str, Any]) -> str:
            with anyio.CancelScope(shield=True), pytest.raises(MCPError, match="Session ended"):
                await ask(ctx)
            stage.open("over")
            return ""

        session = await a.open()
        async with posting(b, session, call("stubborn")) as stream:
            await asked(stream)
            assert (await c.delete(session)).status_code == 200
            await stage.reached("over")
            assert await stream.rest() == []


# ---- what does not count


async def test_a_reply_counts_once(make_store: MakeStore) -> None:
    """P4: whichever of several comes first; the others are acknowledged and dropped."""
    async with staged(make_store) as (stage, a, b, c):

        @stage.tool
        async def name(ctx: Context, arguments: dict[str, Any]) -> str:
            answer = str((await ask(ctx))["content"]["name"])
            await stage.door("end")
            return answer

        session = await a.open()
        async with posting(b, session, call("name")) as stream:
            request = await asked(stream)
            responses = await asyncio.gather(*(m.post(accept(request, m.name), session) for m in (a, b, c, a, b, c)))
            assert {response.status_code for response in responses} == {202}
            late = await c.post(accept(request, "late"), session)
            assert late.status_code == 202
            stage.open("end")
            (answer,) = await stream.rest()
            assert text_of(answer) in ("a", "b", "c")
        assert (await stage.kinds(session)).count(Kind.REPLY) == 1


async def test_unexpected_replies_cost_nothing(make_store: MakeStore) -> None:
    """P4, P10: forged, unsolicited, late: acknowledged, and not one byte of them is kept."""
    async with staged(make_store) as (stage, a, b, c):
        asking(stage)
        session = await a.open()
        async with posting(b, session, call("name")) as stream:
            request = await asked(stream)
            before = await stage.log(session)
            members = (a, b, c)
            for number in range(60):
                forged = {"id": (number, f"srv-{number:016x}", f"{request['id']}x", "", None)[number % 5]}
                response = await members[number % 3].post(accept({"id": "?"}) | forged, session)
                assert response.status_code in (202, 400)
                token = {"progressToken": forged["id"] or "", "progress": 1}
                assert (await c.post(notification("notifications/progress", **token), session)).status_code == 202
            assert await stage.log(session) == before
            await c.post(accept(request), session)
            assert texts_of(await stream.rest()) == ["Ada"]


async def test_another_sessions_reply_does_not_count(make_store: MakeStore) -> None:
    """P4: only from the same session."""
    async with staged(make_store) as (stage, a, b, c):
        asking(stage)
        session, other = await a.open(), await a.open()
        async with posting(b, session, call("name")) as stream:
            request = await asked(stream)
            for member in (a, b, c):
                assert (await member.post(accept(request, "Mallory"), other)).status_code == 202
            assert await stage.log(other) == []
            await c.post(accept(request), session)
            assert texts_of(await stream.rest()) == ["Ada"]


async def test_reply_to_gone_session_gets_404(make_store: MakeStore) -> None:
    """P1."""
    async with staged(make_store) as (_, a, b, c):
        session = await a.open()
        await b.delete(session)
        assert (await c.post(accept({"id": "srv-1"}), session)).status_code == 404


# ---- no way to ask


async def test_only_json_answers_cannot_ask(make_store: MakeStore) -> None:
    """P4: the standalone stream still can."""
    async with staged(make_store, answer="json") as (stage, a, b, c):

        @stage.tool
        async def both(ctx: Context, arguments: dict[str, Any]) -> str:
            assert not ctx.session.can_send_request
            with pytest.raises(NoBackChannelError):
                await ask(ctx)
            return str(await ask_standalone("roots/list"))

        session = await a.open()
        async with posting(b, session, call("both")) as stream, getting(c, session) as standalone:
            await a.post(result(await asked(standalone, "roots/list"), {"roots": []}), session)
            assert text_of(await stream.answer()) == "{'roots': []}"


async def test_every_other_answer_can_ask(make_store: MakeStore) -> None:
    """P4."""
    async with staged(make_store, answer="sse") as (stage, a, b, c):
        asking(stage)
        session = await a.open()
        async with posting(b, session, call("name")) as stream:
            await c.post(accept(await asked(stream)), session)
            assert texts_of(await stream.rest()) == ["Ada"]


# ---- ids


async def test_ids_of_server_requests_never_collide(make_store: MakeStore) -> None:
    """P4: random, not numeric, registered before they are sent."""
    async with staged(make_store) as (stage, *members):
        asking(stage)
        session = await members[0].open()
        ids: set[str] = set()
        for number in range(9):
            async with posting(members[number % 3], session, call("name", number)) as stream:
                request = await asked(stream)
                assert request["id"] not in ids
                ids.add(request["id"])
                await members[(number + 1) % 3].post(accept(request), session)
                await stream.rest()


async def test_own_request_id_is_registered_once(memory: MakeStore) -> None:
    """P4: `CallOptions.request_id`."""
    async with staged(memory) as (stage, a, b, c):

        @stage.tool
        async def own(ctx: Context, arguments: dict[str, Any]) -> str:
            connection = current_connection()
            first = asyncio.create_task(connection.send_raw_request("roots/list", None, {"request_id": "mine"}))
            await asyncio.sleep(0)
            with pytest.raises(ValueError, match="in flight"):
                await connection.send_raw_request("roots/list", None, {"request_id": "mine"})
            stage.open("refused")
            return str(await first)

        session = await a.open()
        async with posting(b, session, call("own")) as stream, getting(c, session) as standalone:
            request = await asked(standalone, "roots/list")
            assert request["id"] == "mine"
            await stage.reached("refused")
            await c.post(result(request, {"roots": []}), session)
            assert text_of(await stream.outcome()) == "{'roots': []}"


async def test_reply_is_expected_before_the_question(make_store: MakeStore) -> None:
    """P4: whoever sees the question can answer it."""
    async with staged(make_store) as (stage, a, b, c):
        expected: list[bool] = []

        @stage.tool
        async def name(ctx: Context, arguments: dict[str, Any]) -> str:
            return str((await ask(ctx))["content"]["name"])

        session = await a.open()
        async with posting(b, session, call("name")) as stream:
            request = await asked(stream)
            expected.append(await stage.is_pending(session, request["id"]))
            # That took it out; it is put back, as nobody else can answer it any more.
            key = next(iter(node_of(b).sessions))
            await stage.store.append(key, Batch([], expect=[request["id"]], uncancel="none"))
            await c.post(accept(request), session)
            assert texts_of(await stream.rest()) == ["Ada"]
        assert expected == [True]
