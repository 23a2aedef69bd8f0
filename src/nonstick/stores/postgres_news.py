"""News of appends by NOTIFY: gathered and sent after the commit, heard on one LISTEN connection per process.

NOTIFY inside an append's transaction would make all appends of a database commit one after the other. So whoever
appended announces it afterwards; what gathers while an announcement is under way goes with the next one. What is
lost (a process that dies in between, an interruption) is found by those who read on their own after some silence.

All of a deployment's news go over one channel, named like its schema. A payload is a first line with the sender's
name, then one line for each append: the session's key alone, which says "read", or

    key position stream tag data [tag data ...]        tags and data in base64, positions counting up from the first

A line that begins with a space says to everybody: read. A connection that has gone silently dead looks like one on
which nothing happens; so while anything is watched, the process sends itself payloads without news and expects to hear
them. They leave by another connection, which also finds a server that is no longer the one that others announce at.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from binascii import a2b_base64, b2a_base64
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from nonstick import apart
from nonstick.errors import NonstickError, StoreUnavailable
from nonstick.store import Event, Wake
from nonstick.stores.postgres_pool import TROUBLE, backoff, connect, refusal
from nonstick.stores.postgres_url import Address
from nonstick.stores.watches import Watches

if TYPE_CHECKING:
    from nonstick.stores.postgres_pool import Connection

__all__ = ["MAX_PAYLOAD", "Announcer", "Listener", "decode", "encode", "pack"]

logger = logging.getLogger("nonstick.store")

MAX_PAYLOAD: Final = 7_999
"""Bytes that PostgreSQL lets through."""

_MAX_PAYLOADS: Final = 32
"""Payloads of one transaction: it holds a lock that all who announce need."""

_MAX_WAITING: Final = 10_000
"""News that may wait for the server. Beyond that everybody is told to read."""

_EVERYBODY: Final = " "


def encode(key: str, events: Sequence[Event] | None) -> str:
    """The line for these events, which follow each other in one stream; without them where they are too many."""
    if not events or sum(len(event.data) for event in events) > MAX_PAYLOAD * 3 // 4:
        return key
    parts = [key, str(events[0].position), str(events[0].stream)]
    for event in events:
        parts += (_to_text(event.tag), _to_text(event.data))
    line = " ".join(parts)
    return line if len(line) <= MAX_PAYLOAD - 40 else key


def decode(line: str) -> list[Event] | None:
    """The events of a line; None where it says "read"."""
    parts = line.split(" ")
    if len(parts) < 5:
        return None
    first, stream = int(parts[1]), int(parts[2])
    pairs = zip(parts[3::2], parts[4::2], strict=True)
    return [Event(first + n, a2b_base64(tag), stream, a2b_base64(data)) for n, (tag, data) in enumerate(pairs)]


def pack(sender: str, lines: list[str]) -> tuple[list[str], int]:
    """Payloads for the first of these lines, and how many those are. A line that is repeated is sent once."""
    payloads: list[str] = []
    parts, size = [sender], len(sender)
    taken = 0
    for line in lines:
        if size + 1 + len(line) > MAX_PAYLOAD:
            payloads.append("\n".join(parts))
            parts, size = [sender], len(sender)
            if len(payloads) == _MAX_PAYLOADS:
                return payloads, taken
        taken += 1
        if line != parts[-1]:
            parts.append(line)
            size += 1 + len(line)
    payloads.append("\n".join(parts))
    return payloads, taken


def _to_text(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode()


class Announcer:
    """Tells the other processes what this one has appended, in order, as soon as it can.

    Args:
        notify: Sends payloads in one transaction; may raise StoreUnavailable.
    """

    def __init__(self, notify: Callable[[list[str]], Awaitable[Any]]) -> None:
        self.sender = secrets.token_hex(8)
        self._notify = notify
        self._lines: list[str] = []
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def announce(self, key: str, events: Sequence[Event] | None) -> None:
        """These events were appended to this log; None: something happened to it."""
        if len(self._lines) >= _MAX_WAITING:
            self._lines = [_EVERYBODY]
        self._lines.append(encode(key, events))
        if self._task is None and not self._closed:
            self._task = apart.spawn(self._run(), name="nonstick: announce on PostgreSQL")

    async def send_to_self(self) -> bool:
        """Sends a payload without news; whether that went well."""
        try:
            await self._notify([self.sender])
        except StoreUnavailable:
            return False
        return True

    async def close(self, timeout: float) -> None:
        """What waits is announced still, if that is possible within these seconds."""
        self._closed = True
        if self._task is not None:
            await asyncio.wait([self._task], timeout=timeout)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        failures = 0
        while self._lines:
            payloads, taken = pack(self.sender, self._lines)
            sent, self._lines = self._lines[:taken], self._lines[taken:]
            try:
                await self._notify(payloads)
                failures = 0
            except StoreUnavailable:
                # What these lines carried will be old news by then, so only that there was something.
                keys = dict.fromkeys(line.partition(" ")[0] or _EVERYBODY for line in sent)
                self._lines = [*keys, *self._lines]
                failures += 1
                await asyncio.sleep(backoff(failures))
        self._task = None


class Listener:
    """The watches of this process, and the connection on which it hears of what others appended.

    It connects with the first watch, and from then on stays connected: sessions come and go faster than connections.

    Args:
        interval: Seconds between two proofs of life. An interruption is noticed within two of them.
    """

    def __init__(self, address: Address, announcer: Announcer, *, connect_timeout: float, interval: float) -> None:
        self._address = address
        self._announcer = announcer
        self._connect_timeout = connect_timeout
        self._interval = interval
        self._watches = Watches()
        self._in_force = False
        self._heard = False
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        watch, stop = self._watches.add(key, wake)
        if self._in_force:
            watch.call_soon(None)
        if self._task is None and not self._closed:
            self._task = apart.spawn(self._run(), name="nonstick: listen to PostgreSQL")
        return stop

    def announce(self, key: str, events: Sequence[Event] | None) -> None:
        """What this process did itself; the others' it hears."""
        self._watches.announce(key, events)

    async def close(self) -> None:
        self._closed = True
        self._watches.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                connection = await connect(self._address, timeout=self._connect_timeout)
            except (*TROUBLE, NonstickError) as error:
                reason = error if isinstance(error, NonstickError) else refusal(error)
                if not failures:
                    logger.warning("cannot listen at %s: %s", self._address.url, reason)
                failures += 1
                await asyncio.sleep(backoff(failures))
                continue
            failures = 0
            try:
                await self._serve(connection)
            except TROUBLE as error:
                logger.warning("lost the news from %s: %s", self._address.url, refusal(error))
            finally:
                self._in_force = False
                connection.terminate()
            # When a server goes down, not every node should be back in the same instant.
            await asyncio.sleep(backoff(0))

    async def _serve(self, connection: Connection) -> None:
        """Listens until the connection is lost or seems dead."""
        lost = asyncio.Event()
        connection.add_termination_listener(lambda _: lost.set())
        async with asyncio.timeout(self._connect_timeout):
            await connection.add_listener(self._address.schema, self._on_payload)
        self._in_force = True
        self._watches.announce_all()
        unheard = 0
        while not lost.is_set() and unheard < 2:
            self._heard = False
            sent = not self._watches or await self._announcer.send_to_self()
            try:
                async with asyncio.timeout(self._interval):
                    await lost.wait()
            except TimeoutError:
                pass
            unheard = 0 if self._heard or not sent or not self._watches else unheard + 1
        reason = "were cut off" if lost.is_set() else "are silent; if it is a pooler, listen_dsn has to lead past it"
        logger.warning("the news from %s %s", self._address.url, reason)

    def _on_payload(self, connection: object, pid: int, channel: str, payload: object) -> None:
        sender, _, body = str(payload).partition("\n")
        if sender == self._announcer.sender:
            self._heard = True
            return
        if not self._watches:
            return
        for line in body.split("\n"):
            key = line.partition(" ")[0]
            if line == _EVERYBODY:
                self._watches.announce_all()
            elif key in self._watches:
                self._watches.announce(key, self._decoded(line))

    def _decoded(self, line: str) -> list[Event] | None:
        try:
            return decode(line)
        except ValueError:
            return None  # a newer release may say more than this one understands (P12)
