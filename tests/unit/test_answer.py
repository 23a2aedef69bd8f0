"""How one request is answered: in whatever order things happen, its client gets one answer, and a stream its end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp.server import Server
from starlette.requests import Request

from nonstick.cluster import Cluster
from nonstick.core.refusals import NOT_FOUND, STREAM_LOST, Refusal
from nonstick.core.settings import Settings
from nonstick.log.guard import GuardedStore
from nonstick.node.node import Node
from nonstick.session.answer import Answer
from nonstick.session.kernel import KernelRunner
from nonstick.session.outlet import Outlet
from nonstick.session.services import Served
from nonstick.stores.memory import MemoryStore

pytestmark = pytest.mark.anyio

BODY: Final = b'{"answer":1}'
SHUT: Final = b'{"shut":1}'
FENCE: Final = b": fence\r\n\r\n"


def made(*, resumes: bool = False) -> Answer:
    """Nobody waits for it yet."""
    served = Served(partial(KernelRunner, Server(""), None), "")
    node = Node(served, GuardedStore(MemoryStore()), Settings(), cluster_log=Cluster.private().log)
    return Answer(node.services, Request({"type": "http", "headers": []}), resumes=resumes, gone=None)


@dataclass
class Flags:
    """The same, as flags: an independent way to say it."""

    begins: str | None = None
    frames: list[str] = field(default_factory=list[str])
    gave_id: bool = False
    ended: bool = False

    def decide(self, how: str) -> None:
        self.begins = self.begins or how

    def put(self, frame: str) -> None:
        if not self.ended:
            self.frames.append(frame)


def stream(answer: Answer, flags: Flags) -> None:
    answer.begin_stream()
    flags.decide("stream")


def message(answer: Answer, flags: Flags) -> None:
    """Comes only from a stream that the store has."""
    if flags.begins == "stream":
        answer.put("an id", b'{"message":1}')
        flags.put("message")
        flags.gave_id = True


def give(answer: Answer, flags: Flags) -> None:
    answer.give(BODY)
    flags.decide("body")
    flags.ended |= flags.begins == "stream"


def refuse(answer: Answer, flags: Flags) -> None:
    answer.refuse(Refusal(NOT_FOUND))
    flags.decide("refusal")
    flags.ended |= flags.begins == "stream"


def lose(answer: Answer, flags: Flags) -> None:
    answer.lose(1)
    flags.decide("stream")
    if not flags.gave_id:
        flags.put("lost")
    flags.ended |= flags.begins == "stream"


def hand_over(answer: Answer, flags: Flags) -> None:
    answer.hand_over()
    if flags.gave_id:
        flags.put("retry")
        flags.ended = True


def disconnect(answer: Answer, flags: Flags) -> None:
    answer.disconnect(SHUT)
    flags.decide("shut")
    if flags.gave_id:
        flags.put("retry")
        flags.ended = True
    elif flags.begins == "stream":
        flags.put("shut")
        flags.ended = True


STEPS: Final[Sequence[Callable[[Answer, Flags], None]]] = (stream, message, give, refuse, lose, hand_over, disconnect)


async def sent(outlet: Outlet) -> tuple[bytes, bool]:
    """All frames, and whether the stream ended: else a further frame comes through, after which it is ended."""
    parts: list[Any] = []

    async def send(part: Any) -> None:
        parts.append(part)

    outlet.put(FENCE)
    outlet.end()
    assert await outlet.pump(send)
    frames = b"".join(part["body"] for part in parts)
    return frames.removesuffix(FENCE), not frames.endswith(FENCE)


def kind(block: bytes) -> str:
    """Of one frame."""
    data = next((line[6:] for line in block.splitlines() if line.startswith(b"data: ")), b"")
    if not data:
        return "retry"
    body = json.loads(data)
    return "lost" if body.get("error", {}).get("message") == STREAM_LOST.message else next(iter(body))


@given(steps=st.lists(st.sampled_from(STEPS), max_size=8))
async def test_answer_is_as_its_flags(steps: Sequence[Callable[[Answer, Flags], None]]) -> None:
    answer, flags = made(), Flags()
    for step in steps:
        step(answer, flags)
    if flags.begins is None:
        assert not answer.outcome.done()
        return
    outcome = await answer.outcome
    if flags.begins == "stream":
        assert isinstance(outcome, Outlet)
        frames, ended = await sent(outcome)
        blocks = [block for block in frames.replace(b"\r\n", b"\n").split(b"\n\n") if block]
        assert [kind(block) for block in blocks] == flags.frames
        assert ended is flags.ended
    elif flags.begins == "refusal":
        assert isinstance(outcome, Refusal)
    else:
        assert outcome == (BODY if flags.begins == "body" else SHUT)


async def test_cancelled_callers_stream_goes_to_nobody() -> None:
    """P3: whoever sends more than a connection takes does not wait for a client that is not there."""
    answer = made()

    async def wait() -> None:
        with answer:
            await answer.outcome

    waiting = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    assert answer.shows_client(now=0.0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert not answer.shows_client(now=0.0)
    answer.begin_stream()
    answer.put("an id", b"x" * 1_000_000)
    assert answer.outlet.gone
    assert answer.outlet.has_room


@pytest.mark.parametrize("decide", [give, refuse])
async def test_nobody_waits_beside_an_answer(decide: Callable[[Answer, Flags], None]) -> None:
    """P16: what a handler still sends once its client has another answer finds no reader, and goes nowhere."""
    answer = made()
    decide(answer, Flags())
    answer.begin_stream()
    answer.put("an id", b"x" * 1_000_000)
    assert answer.outlet.has_room
    async with asyncio.timeout(60):
        assert await answer.outlet.pump(lambda part: asyncio.sleep(0))


@pytest.mark.parametrize("resumes", [True, False])
async def test_only_knowing_clients_are_primed(resumes: bool) -> None:
    answer = made(resumes=resumes)
    answer.begin_stream()
    answer.prime("an id")
    answer.hand_over()
    frames, ended = await sent(answer.outlet)
    assert (b"an id" in frames) is resumes
    # Without an id the client could not come back.
    assert ended is resumes
