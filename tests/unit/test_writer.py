"""What one writer of a log does to the store: one append at a time (P3)."""

from __future__ import annotations

import asyncio

import pytest

from nonstick.core.events import Kind, draft
from nonstick.errors import StoreUnavailable
from nonstick.log.writer import Sender
from nonstick.store import Appended, Batch

pytestmark = pytest.mark.anyio


class Log:
    """Appends one batch at a time, and only when it is told to; what comes meanwhile would be lost."""

    def __init__(self) -> None:
        self.came: asyncio.Queue[Batch] = asyncio.Queue()
        self.answers: asyncio.Queue[bool] = asyncio.Queue()
        self.outstanding = self.most_outstanding = 0

    async def append(self, batch: Batch, /, *, patience: float) -> Appended:
        assert patience > 0
        self.outstanding += 1
        self.most_outstanding = max(self.most_outstanding, self.outstanding)
        self.came.put_nowait(batch)
        try:
            if not await self.answers.get():
                raise StoreUnavailable("away")
        finally:
            self.outstanding -= 1
        return Appended(1, duplicate=False, size=0, count=0)


async def test_sender_has_one_append_outstanding() -> None:
    """Those who send at the same time wait for each other, in the order of their calls, under numbers without a gap."""
    log = Log()
    sender = Sender(log.append)
    drafts = [draft(Kind.MESSAGE, b"{}") for _ in range(4)]
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for event in drafts:
            group.create_task(sender.send(event))
        batches = []
        for _ in drafts:
            batches.append(await log.came.get())
            log.answers.put_nowait(True)
    assert log.most_outstanding == 1
    assert [list(batch.events) for batch in batches] == [[event] for event in drafts]
    assert [batch.sequence for batch in batches] == [1, 2, 3, 4]
    assert len({batch.writer for batch in batches}) == 1


async def test_sender_goes_on_as_another_writer() -> None:
    """Nobody knows the next number of one whose append failed, or was cancelled."""
    log = Log()
    sender = Sender(log.append)
    async with asyncio.timeout(60):
        log.answers.put_nowait(False)
        with pytest.raises(StoreUnavailable):
            await sender.send(draft(Kind.MESSAGE, b"{}"))
        cancelled = asyncio.ensure_future(sender.send(draft(Kind.MESSAGE, b"{}")))
        batches = [await log.came.get(), await log.came.get()]
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        log.answers.put_nowait(True)
        await sender.send(draft(Kind.MESSAGE, b"{}"))
        batches.append(await log.came.get())
    assert [batch.sequence for batch in batches] == [1, 1, 1]
    assert len({batch.writer for batch in batches}) == 3
