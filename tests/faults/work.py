"""What one client does with its session in a campaign."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import httpx2

from tests.faults.client import PAUSE, Call, Session, Target

__all__ = ["Worker"]


class Worker:
    """One client's doings, drawn at random, until it is done or the campaign is over.

    Args:
        session: Open.
        nodes: Each is asked whether an ended session has ended there too.
        losing: The store may lose what it has acknowledged: nothing waits for ever for what may be lost.
    """

    def __init__(
        self,
        session: Session,
        rng: random.Random,
        nodes: Sequence[Target],
        *,
        goes_on: Callable[[], bool],
        losing: bool,
    ) -> None:
        self._session = session
        self._rng = rng
        self._nodes = nodes
        self._goes_on = goes_on
        self._losing = losing

    @property
    def _is_over(self) -> bool:
        return not self._goes_on() or self._session.gone

    async def work(self) -> None:
        """A dozen calls at most, some at a time, while the standalone stream is read."""
        session, rng = self._session, self._rng
        session.listen()
        running: set[asyncio.Task[None]] = set()
        for _ in range(rng.randint(3, 12)):
            if self._is_over:
                break
            running.add(asyncio.create_task(self._call()))
            if len(running) > 2:
                _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        if rng.random() < 0.3:
            await self._delete()
        for task in running:
            await task
        if not (session.ended or session.gone):
            await session.catch_up()

    async def hurry(self) -> None:
        """Many short requests, one after the other."""
        session, rng = self._session, self._rng
        for _ in range(rng.randint(20, 80)):
            if self._is_over:
                return
            match rng.randrange(10):
                case 0 | 1 | 2 | 3 | 4:
                    await session.call("plain").end()
                case 5:
                    await session.call("count", steps=rng.randint(1, 3), pause=0.0).end()
                case 6:
                    await session.call("ask", steps=1, **self._patience).end()
                case _:
                    await self._ping(None)
        if rng.random() < 0.5:
            await self._delete()

    async def vanish(self, seconds: float) -> None:
        """Goes away while the server waits for it, or works for it; its session must have ended so much later."""
        session, rng = self._session, self._rng
        match rng.randrange(3):
            case 0:
                call = session.call("count", steps=10_000, pause=0.05)
            case 1:
                call = session.call("wait", seconds=3600.0)
            case _:
                session.deaf = True
                call = session.call("ask", steps=1)
        if rng.random() < 0.5:
            session.listen()
        try:
            async with asyncio.timeout(rng.uniform(0.3, 2.0)):
                await call.started.wait()
        except TimeoutError:
            pass
        await session.vanish(seconds)

    async def _delete(self) -> None:
        await self._session.delete()
        for node in self._nodes:
            await self._ping(node)

    async def _ping(self, node: Target | None) -> None:
        try:
            await self._session.ping(node)
        except (httpx2.TransportError, TimeoutError):
            await asyncio.sleep(PAUSE)  # it is down: what it says is not known

    async def _call(self) -> None:
        session, rng = self._session, self._rng
        match rng.randrange(8):
            case 0 | 1:
                call = session.call("count", steps=rng.randint(3, 20), pause=rng.uniform(0.01, 0.15))
            case 2:
                steps = rng.randint(3, 20)
                call = session.call("recount", steps=steps, pause=rng.uniform(0.01, 0.15), repeatable=True)
            case 3:
                steps = rng.randint(2, 10)
                call = session.call("announce", steps=steps, pause=rng.uniform(0.01, 0.15), standalone=True)
            case 4:
                call = session.call("ask", steps=rng.randint(1, 3), **self._patience)
            case 5:
                call = session.call("plain")
            case 6:
                call = session.call("wait", seconds=rng.uniform(0.0, 1.0))
            case _:
                call = await self._cancelled()
        await call.end()
        if rng.random() < 0.3 and not session.ended:
            await session.replay(call)

    @property
    def _patience(self) -> dict[str, Any]:
        """How long a tool waits for a reply: a store that loses writes may lose it after it was accepted."""
        return {"patience": 20.0} if self._losing else {}

    async def _cancelled(self) -> Call:
        # Longer than anybody waits: it ends because it is cancelled.
        # If its cancel may be lost, it ends at last.
        call = self._session.call("count", steps=200 if self._losing else 10_000, pause=0.05)
        await asyncio.sleep(self._rng.choice([0.0, 0.05, 0.5]))
        await self._session.cancel(call)
        return call
