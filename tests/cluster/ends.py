"""Every way in which a handler can end, and a server whose handlers end in them, in every phase of a request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import anyio
import mcp_types as types
from mcp.server import Server
from mcp.server.connection import Connection
from mcp.shared.exceptions import MCPError
from mcp_types import INTERNAL_ERROR, INVALID_PARAMS
from pydantic import BaseModel, RootModel, field_serializer

from nonstick import current_connection
from tests.cluster.conftest import MakeStore
from tests.cluster.stage import Context, Stage, ask, say

__all__ = ["CANCELLED", "EXITING", "EXITS", "INTERRUPTED", "INVALID", "WAYS", "Ends", "Way", "end_by"]


class Mute(Exception):
    """Neither `str` nor `repr` of it gives anything."""

    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


class Rude(Exception):
    """Its text ends whoever asks for it."""

    def __str__(self) -> str:
        raise asyncio.CancelledError


class Own(BaseException):
    """Not one of Python's."""


class Grumpy(BaseModel):
    """What cannot be written."""

    number: int = 1

    @field_serializer("number")
    def refuse(self, _: int) -> int:
        raise ArithmeticError("no number today")


@dataclass(frozen=True)
class Way:
    """How a handler ends, and what its client is told.

    Attributes:
        end: Returns the result, or does not.
        code: Of the error; None for a result.
        text: Of the error.
    """

    end: Callable[[], Awaitable[Any]]
    code: int | None
    text: str = ""

    def check(self, message: dict[str, Any], request_id: object) -> None:
        """This is the answer to that request, and what a client is to be told."""
        shown = str(message)[:400]
        assert (message["jsonrpc"], message["id"], message.get("method")) == ("2.0", request_id, None), shown
        assert ("result" in message) == (self.code is None), shown
        if self.code is not None:
            assert (message["error"]["code"], message["error"]["message"]) == (self.code, self.text), shown


def returning(value: Callable[[], Any]) -> Callable[[], Awaitable[Any]]:
    async def end() -> Any:
        return {"value": value()}

    return end


def raising(error: Callable[[], BaseException]) -> Callable[[], Awaitable[Any]]:
    async def end() -> Any:
        raise error()

    return end


def _circle() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


def _deep() -> list[Any]:
    deep: list[Any] = []
    for _ in range(3000):
        deep = [deep]
    return deep


def _caused_by_itself() -> BaseException:
    error = ValueError("round")
    error.__cause__ = KeyError("and round")
    error.__cause__.__cause__ = error
    return error


def _recurse(depth: int = 0) -> int:
    return _recurse(depth + 1)


async def _too_deep() -> Any:
    return _recurse()


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def _cancel_itself() -> Any:
    _this_task().cancel()
    await asyncio.sleep(60)


async def _cancel_itself_and_return() -> Any:
    _this_task().cancel()
    return {"value": "said"}


async def _cancel_itself_soon() -> Any:
    """Whatever this task awaits next, it is cancelled there."""
    asyncio.get_running_loop().call_soon(_this_task().cancel)
    return {"value": "said"}


async def _await_cancelled_task() -> Any:
    inner = asyncio.create_task(asyncio.sleep(60))
    inner.cancel()
    await inner


async def _cancel_and_swallow() -> Any:
    _this_task().cancel()
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        return {"value": "swallowed"}


async def _leave_scope_open() -> Any:
    anyio.CancelScope().__enter__()
    return {"value": "said"}


async def _leave_cancelled_scope_open() -> Any:
    anyio.CancelScope().__enter__().cancel()
    return {"value": "said"}


async def _raise_in_open_scope() -> Any:
    anyio.CancelScope(shield=True).__enter__()
    raise ValueError("in a scope")


async def _boom() -> None:
    raise ValueError("inner")


async def _group() -> Any:
    async with anyio.create_task_group() as group:
        group.start_soon(_boom)
    return {}


CANCELLED: Final = "The handler of this request was cancelled on the server"
INTERRUPTED: Final = "The handler of this request was interrupted on the server"
EXITING: Final = "The server node stops: the handler of this request told it to"
INVALID: Final = "Handler returned an invalid result"
_HUGE: Final = "long " * 400_000

WAYS: Final[dict[str, Way]] = {
    "a result": Way(returning(lambda: 1), None),
    "not a number": Way(returning(lambda: float("nan")), None),
    "lone surrogate": Way(returning(lambda: "\ud800"), INTERNAL_ERROR, INVALID),
    "bytes": Way(returning(lambda: b"\xff"), INTERNAL_ERROR, INVALID),
    "an object": Way(returning(object), INTERNAL_ERROR, INVALID),
    "a circle": Way(returning(_circle), INTERNAL_ERROR, INVALID),
    "too deep": Way(returning(_deep), INTERNAL_ERROR, INVALID),
    "what cannot be written": Way(returning(Grumpy), INTERNAL_ERROR, INVALID),
    "an exception": Way(raising(lambda: ValueError("boom")), 0, "boom"),
    "an error of its own": Way(raising(lambda: MCPError(7, "seven", {"a": 1})), 7, "seven"),
    "an error with a lone surrogate": Way(raising(lambda: MCPError(7, "s\ud800even")), 7, "s?even"),
    "an error with an object": Way(raising(lambda: MCPError(7, "seven", object())), 7, "seven"),
    "an error with both": Way(raising(lambda: MCPError(7, "s\udfffeven", {"a": "\ud800"})), 7, "s?even"),
    "an error that cannot be written": Way(raising(lambda: MCPError(7, "seven", Grumpy())), 7, "seven"),
    "an exception with a lone surrogate": Way(raising(lambda: ValueError("b\ud800oom")), 0, "b?oom"),
    # The SDK asks for their text first, and so raises what they raise.
    "an exception without text": Way(raising(Mute), 0, "no text"),
    "an exception with a rude text": Way(raising(Rude), INTERNAL_ERROR, CANCELLED),
    "an exception with a huge text": Way(raising(lambda: ValueError(_HUGE)), 0, _HUGE),
    "an exception that causes itself": Way(raising(_caused_by_itself), 0, "round"),
    "a validation error": Way(raising(lambda: _validation_error()), INVALID_PARAMS, "Invalid request parameters"),
    "too much recursion": Way(_too_deep, 0, "maximum recursion depth exceeded"),
    "no memory": Way(raising(lambda: MemoryError("none left")), 0, "none left"),
    "the end of an iterator": Way(raising(StopIteration), 0, "coroutine raised StopIteration"),
    "the end of an async iterator": Way(raising(StopAsyncIteration), 0, ""),
    "a group": Way(_group, 0, "unhandled errors in a TaskGroup (1 sub-exception)"),
    "a group of anything": Way(
        raising(lambda: BaseExceptionGroup("all", [Own(), ValueError("secret")])), INTERNAL_ERROR, INTERRUPTED
    ),
    "the exit of a generator": Way(raising(GeneratorExit), INTERNAL_ERROR, INTERRUPTED),
    "an exception of no kind": Way(raising(Own), INTERNAL_ERROR, INTERRUPTED),
    "a cancellation": Way(raising(asyncio.CancelledError), INTERNAL_ERROR, CANCELLED),
    "an inner task's cancellation": Way(_await_cancelled_task, INTERNAL_ERROR, CANCELLED),
    "its own cancellation": Way(_cancel_itself, INTERNAL_ERROR, CANCELLED),
    "its own cancellation, left behind": Way(_cancel_itself_and_return, None),
    "its own cancellation, later": Way(_cancel_itself_soon, None),
    "its own cancellation, swallowed": Way(_cancel_and_swallow, None),
    "a scope left open": Way(_leave_scope_open, None),
    "a scope left open and cancelled": Way(_leave_cancelled_scope_open, None),
    "an exception in a scope left open": Way(_raise_in_open_scope, 0, "in a scope"),
}

EXITS: Final[dict[str, Way]] = {
    "exit": Way(raising(lambda: SystemExit(3)), INTERNAL_ERROR, EXITING),
    "keyboard interrupt": Way(raising(KeyboardInterrupt), INTERNAL_ERROR, EXITING),
}
"""They also stop the node."""


def _validation_error() -> Exception:
    try:
        types.Tool.model_validate({})
    except ValueError as error:
        return error
    raise AssertionError


class _Params(RootModel[dict[str, Any]]):
    pass


def end_by(way: str, phase: str, request_id: object = 1) -> dict[str, Any]:
    """A request whose handler comes to this phase and then ends in this way."""
    params = {"way": way, "phase": phase}
    return {"jsonrpc": "2.0", "id": request_id, "method": "work/end", "params": params}


class Ends(Stage):
    """Nodes whose handlers end in every way."""

    def __init__(self, make_store: MakeStore, **options: Any) -> None:
        self.listing: Iterator[Way] = iter(())
        """How the handler of `tools/list` ends, one time after the other."""
        self.rebuilding: Way | None = None
        """How `rehydrate` ends."""
        self.opening: Way | None = None
        """How a middleware ends while it sees `initialize`, or once the handshake is done."""
        self.opening_after = False
        super().__init__(make_store, **options)

    def server(self) -> Server[Any]:
        server = Server("ends", version="1", on_list_tools=self._list, on_call_tool=self._call)
        server.add_request_handler("work/end", _Params, self._work)
        server.add_notification_handler("notifications/end", _Params, self._note)
        server.middleware.append(self._see)
        return server

    async def _work(self, ctx: Context, params: _Params) -> Any:
        way = {**WAYS, **EXITS}[params.root["way"]]
        match params.root["phase"]:
            case "streams":
                await say(ctx, "begun")
                await self.door(params.root["way"])
            case "says":
                await say(ctx, "begun")
            case "asks":
                await ask(ctx)
            case "reports":
                await ctx.session.report_progress(0.5)
            case "keeps state":
                current_connection().state["kept"] = params.root["way"]
            case "asks when it ends":
                result = await way.end()
                await ask(ctx)
                return result
            case "hears of progress":
                await ask(ctx, on_progress=lambda *_: way.end())
                return {}
            case _:
                pass
        return await way.end()

    async def _note(self, ctx: Context, params: _Params) -> None:
        current_connection().state["noted"] = params.root["way"]
        await {**WAYS, **EXITS}[params.root["way"]].end()

    async def _see(self, ctx: Context, call_next: Any) -> Any:
        if ctx.method != "initialize" or self.opening is None:
            return await call_next(ctx)
        if self.opening_after:
            await call_next(ctx)
        return await self.opening.end()

    async def _list(self, ctx: Context, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        for way in self.listing:
            await way.end()
        schema = {"type": "object"}
        annotations = types.ToolAnnotations(idempotent_hint=True)
        return types.ListToolsResult(tools=[types.Tool(name="safe", input_schema=schema, annotations=annotations)])

    async def rehydrate(self, connection: Connection) -> None:
        if self.rebuilding is not None:
            await self.rebuilding.end()
