"""What waits for a connection goes out in order, and a slow or lost client at the other end holds nobody up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from nonstick.session.outlet import Mark, Outlet
from nonstick.store import Cursor

pytestmark = pytest.mark.anyio


class Client:
    """Takes ASGI messages, as fast as it is allowed to."""

    def __init__(self, *, slow: bool = False) -> None:
        self.messages: list[Message] = []
        self.taking = asyncio.Event()
        self._more = asyncio.Event()
        if not slow:
            self.taking.set()

    async def send(self, message: Message) -> None:
        self.messages.append(message)
        self._more.set()
        await self.taking.wait()

    async def received(self, count: int) -> None:
        """Returns once so many messages have come."""
        while len(self.messages) < count:
            self._more.clear()
            await self._more.wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


def start(outlet: Outlet, client: Client) -> asyncio.Task[bool]:
    return asyncio.create_task(outlet.pump(client.send))


async def test_frames_arrive_in_order_then_end() -> None:
    outlet, client = Outlet(), Client()
    pumping = start(outlet, client)
    for number in range(100):
        outlet.put(b"%d " % number, Mark(number))
        if number % 7 == 0:
            await asyncio.sleep(0)
    outlet.end()
    assert await pumping is True
    assert client.body == b"".join(b"%d " % number for number in range(100))
    assert [message["more_body"] for message in client.messages][-1] is False
    assert all(message["more_body"] for message in client.messages[:-1])
    assert outlet.sent == Mark(99)


async def test_nothing_is_written_after_the_end() -> None:
    outlet, client = Outlet(), Client()
    outlet.put(b"a")
    outlet.end()
    outlet.put(b"b")
    assert await outlet.pump(client.send) is True
    outlet.put(b"c")
    assert client.body == b"a"


async def test_producer_waits_for_slow_reader() -> None:
    """P10."""
    outlet, client = Outlet(room=10), Client(slow=True)
    pumping = start(outlet, client)
    outlet.put(b"x" * 11)
    waiting = asyncio.create_task(outlet.room())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    client.taking.set()
    async with asyncio.timeout(60):
        await waiting
    outlet.end()
    assert await pumping is True


async def test_stalled_reader_is_cut_off() -> None:
    """P10."""
    outlet, client = Outlet(room=10, patience=0.05), Client(slow=True)
    outlet.put(b"x" * 11, Mark(1))
    async with asyncio.timeout(60):
        assert await start(outlet, client) is False
        assert outlet.gone
        await outlet.room()
    outlet.put(b"y", Mark(2))
    outlet.skip_to(Mark(3))
    assert outlet.sent == Mark()


async def test_what_the_connection_took_is_known() -> None:
    """A listener says how far it got by it."""
    outlet, client = Outlet(), Client(slow=True)
    outlet.put(b"a", Mark(1))
    pumping = start(outlet, client)
    await asyncio.sleep(0.01)
    outlet.put(b"b", Mark(2))
    # What is passed over comes after what waits.
    outlet.skip_to(Mark(2, Cursor(7)))
    assert outlet.sent == Mark()
    client.taking.set()
    async with asyncio.timeout(60):
        await outlet.flushed()
    assert outlet.sent == Mark(2, Cursor(7))
    outlet.skip_to(Mark(3))
    assert outlet.sent == Mark(3)
    outlet.end()
    await pumping
    assert outlet.sent == Mark(3)


@pytest.mark.parametrize("full", [False, True])
async def test_leaving_client_ends_the_pump(full: bool) -> None:
    """Whoever waits for it goes on."""
    outlet, client = Outlet(room=10, ping=60), Client(slow=full)
    pumping = start(outlet, client)
    await asyncio.sleep(0)
    if full:
        outlet.put(b"x" * 100)
    waiting = asyncio.create_task(outlet.room())
    await asyncio.sleep(0.01)
    outlet.leave()
    client.taking.set()
    async with asyncio.timeout(60):
        assert await pumping is False
        await waiting


async def test_broken_connection_frees_who_waits() -> None:
    outlet = Outlet(room=10)

    async def broken(message: Message) -> None:
        raise OSError("connection lost")

    outlet.put(b"x" * 100)
    waiting = asyncio.create_task(outlet.room())
    with pytest.raises(OSError, match="connection lost"):
        await outlet.pump(broken)
    async with asyncio.timeout(60):
        await waiting
    assert outlet.gone


async def test_comments_keep_silent_stream_alive() -> None:
    outlet, client = Outlet(ping=0.01), Client()
    pumping = start(outlet, client)
    async with asyncio.timeout(60):
        await client.received(3)
    outlet.end()
    await pumping
    assert set(client.body.split(b"\r\n\r\n")) == {b": ping", b""}


@given(st.lists(st.binary(min_size=1, max_size=20)), st.data())
def test_no_frame_is_lost_or_doubled(frames: list[bytes], data: st.DataObject) -> None:
    pauses = data.draw(st.lists(st.integers(0, 2), min_size=len(frames), max_size=len(frames)))

    async def run() -> Any:
        outlet, client = Outlet(room=8), Client()
        pumping = start(outlet, client)
        for frame, pause in zip(frames, pauses, strict=True):
            await outlet.room()
            outlet.put(frame)
            for _ in range(pause):
                await asyncio.sleep(0)
        outlet.end()
        await pumping
        return client.body

    assert asyncio.run(run()) == b"".join(frames)
