"""What stands in a session's log and record, kind by kind: what nodes of another release read there (P12)."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any, Final

import mcp_types as types
import pytest
from mcp.server import Server

from nonstick import current_connection
from nonstick.core.events import Kind, body_of, decode, kind_of
from nonstick.core.names import session_key
from nonstick.testing.cluster import Session
from tests.cluster.conftest import MakeStore
from tests.cluster.sse import DEADLINE, getting, posting
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
)

pytestmark = pytest.mark.anyio

Bodies = dict[Kind, set[tuple[str, ...]]]

MESSAGES: Final = {Kind.MESSAGE, Kind.TERMINAL, Kind.REPLY}
"""Kinds whose bodies are what the client gets, or sent."""

ANYWHERE: Final[Bodies] = {
    Kind.OPENED: {("attempt", "node", "partial", "request")},
    Kind.PROGRESS: {("progress", "progressToken")},
    Kind.CANCEL: {("requestId",)},
    Kind.LISTENING: {("heard", "listener", "node", "since")},
    Kind.LEFT: {("heard", "listener", "read", "tag")},
    Kind.CHANGED: {("level",), ("heard", "subscribed"), ("unsubscribed",)},
}
"""What else says what, where any node serves a session."""


class Subscribed(Stage):
    """Its server takes subscriptions and log levels."""

    def server(self) -> Server[Any]:
        async def nothing(ctx: Context, params: Any) -> types.EmptyResult:
            return types.EmptyResult()

        server = super().server()
        server.add_request_handler("resources/subscribe", types.SubscribeRequestParams, nothing)
        server.add_request_handler("resources/unsubscribe", types.UnsubscribeRequestParams, nothing)
        server.add_request_handler("logging/setLevel", types.SetLevelRequestParams, nothing)
        return server


async def bodies(stage: Stage, session: Session) -> Bodies:
    """The names in the bodies of this session's events."""
    found: defaultdict[Kind, set[tuple[str, ...]]] = defaultdict(set)
    for event in await stage.log(session):
        kind = kind_of(event.data)
        assert kind is not None
        if kind not in MESSAGES and body_of(event.data):
            found[kind].add(tuple(sorted(decode(event.data))))
    return dict(found)


def request(method: str, id: int, **params: Any) -> dict[str, Any]:  # noqa: A002
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": params}


async def test_shared_session_is_written_as_ever(memory: MakeStore) -> None:
    async with Subscribed(memory, window=DEADLINE) as stage:
        a, b, c = stage.cluster

        @stage.tool
        async def work(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "begun")
            await announce(ctx, "aside")
            current_connection().state["kept"] = 1
            answer = await ask(ctx, on_progress=_hear)
            stage.open("asked")
            return str(answer["content"]["name"])

        @stage.tool
        async def linger(ctx: Context, arguments: dict[str, Any]) -> str:
            await say(ctx, "begun")
            await stage.door("never")
            return "never"

        async def _hear(*_: Any) -> None:
            stage.open("progress")

        session = await a.open(capabilities={"elicitation": {}})
        for member, message in (
            (a, request("resources/subscribe", 1, uri="x://1")),
            (b, request("resources/unsubscribe", 2, uri="x://1")),
            (c, request("logging/setLevel", 3, level="info")),
        ):
            assert (await member.post(message, session)).status_code == 200
        async with getting(c, session) as listener:
            async with posting(a, session, call("work", 4)) as stream:
                await stream.message()
                question = await stream.message()
                token = question["params"]["_meta"]["progressToken"]
                step = notification("notifications/progress", progressToken=token, progress=0.5)
                assert (await b.post(step, session)).status_code == 202
                await stage.reached("progress")
                assert (await b.post(accept(question), session)).status_code == 202
                await stream.rest()
            async with posting(a, session, call("linger", 5)) as stream:
                await stream.message()
                assert (await b.post(cancel(5), session)).status_code == 202
                await stream.rest()
            await listener.message()

        async def has_left() -> bool:
            return Kind.LEFT in await stage.kinds(session)

        await eventually(has_left)
        assert await bodies(stage, session) == ANYWHERE
        fields = (await stage.store.load(session_key(session.id))).fields
        names = {name.partition(":")[0] for name in fields}
        assert names == {"v", "protocol", "client", "principal", "initialized", "level", "state", "heard"}
        assert fields["state:kept"] == b"1"


async def test_owned_session_is_written_as_ever(memory: MakeStore) -> None:
    async def rehydrate(_: Any) -> None:
        stage.open("rehydrated")

    async with Stage(memory, placement="owner", rehydrate=rehydrate) as stage:
        a, b, _ = stage.cluster

        @stage.tool
        async def work(ctx: Context, arguments: dict[str, Any]) -> str:
            return "done"

        session = await a.open()
        key = session_key(session.id)
        owner = (await stage.store.load(key)).fields["owner"]
        assert owner == node_of(a).services.node_id.encode()
        assert (await b.post(call("work", 1), session)).status_code == 200
        assert (await b.post(notification("notifications/roots/list_changed"), session)).status_code == 202
        a.app.manager.begin_drain()
        await eventually(lambda: key not in node_of(a).sessions)
        found = await bodies(stage, session)
        assert found[Kind.OPENED] == {("attempt", "node", "relay", "request")}
        assert found[Kind.TAKEN] == {("attempt", "node")}
        assert found[Kind.NOTICE] == {("http", "notification")}
        assert found[Kind.OWNER] == {("node",)}
        [relayed] = [decode(event.data) for event in await stage.log(session) if kind_of(event.data) is Kind.OPENED]
        assert relayed["relay"].keys() == {"http", "since", "version"}
        assert json.loads(json.dumps(relayed["relay"]["http"])).keys() == {
            "client",
            "headers",
            "method",
            "params",
            "path",
            "query",
            "root",
            "scheme",
            "server",
            "user",
        }
