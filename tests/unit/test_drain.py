"""What a node that stops ends, and when (P8)."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from nonstick.core.settings import Settings
from nonstick.node.drain import GONE_AFTER, Drain
from nonstick.waiting.deadline import Deadline

pytestmark = pytest.mark.anyio


class Scene:
    """All that a drain ends, and what it did to that, in order."""

    def __init__(self, grace: float) -> None:
        self.did: list[str] = []
        self.ended_at = 0.0
        self.ended = asyncio.Event()
        self.tasks: list[asyncio.Task[Any]] = []
        self.request = SimpleNamespace(
            fail=lambda _: self.did.append("fail"),
            abandon=self._abandon,
            disconnect_client=lambda: self.did.append("disconnect"),
        )
        self.session = SimpleNamespace(exchanges={"1": self.request})
        self.reader = SimpleNamespace(
            stays=True, hand_over=lambda: self.did.append("hand over"), cut_off=lambda: self.did.append("cut off")
        )
        self.readers = [self.reader]
        store: Any = SimpleNamespace(end_at=self._end_at, end_pending=self._end_pending)
        tasks: Any = SimpleNamespace(spawn=self._spawn)
        sessions: Any = {"key": self.session}
        readers: Any = self.readers
        self.drain = Drain(store, Settings(grace=grace), tasks, sessions, readers)

    async def _abandon(self) -> None:
        self.did.append("abandon")

    def _end_at(self, when: float) -> None:
        self.ended_at = when

    def _end_pending(self) -> None:
        self.did.append("end calls")
        asyncio.get_running_loop().call_soon(self.ended.set)

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self.tasks.append(task)
        return task

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def test_grace_is_followed_by_ordered_ends() -> None:
    """A handler is told first; one that does not stop is given up; then the client goes, and what waits for a store."""
    scene = Scene(grace=0.0)
    hastened = Deadline(None)
    scene.drain.until_closing[hastened] = None
    scene.drain.begin()
    try:
        async with asyncio.timeout(60):
            await scene.ended.wait()
        assert scene.did[:6] == ["hand over", "cut off", "fail", "abandon", "disconnect", "end calls"]
        assert hastened.was_hastened
    finally:
        await scene.close()


async def test_no_store_call_outlasts_its_node() -> None:
    scene = Scene(grace=30.0)
    before = asyncio.get_running_loop().time()
    scene.drain.begin()
    try:
        after = asyncio.get_running_loop().time()
        assert before + 30.0 + GONE_AFTER <= scene.ended_at <= after + 30.0 + GONE_AFTER
        assert not scene.drain.is_closing
    finally:
        await scene.close()


@pytest.mark.parametrize("first", ["request", "reader"])
async def test_drain_awaits_requests_and_staying_readers(first: str) -> None:
    """In whichever order they end; a reader whose client can come back does not count."""
    scene = Scene(grace=60.0)
    scene.readers.append(SimpleNamespace(stays=False, hand_over=lambda: None))
    scene.drain.begin()
    finished = asyncio.ensure_future(scene.drain.finished())
    try:
        ends = [scene.session.exchanges.clear, lambda: scene.readers.remove(scene.reader)]
        for end in ends if first == "request" else reversed(ends):
            for _ in range(5):
                await asyncio.sleep(0)
            assert not finished.done()
            end()
            scene.drain.left()
        async with asyncio.timeout(60):
            await finished
    finally:
        finished.cancel()
        await scene.close()
