"""News of appends by NOTIFY: gathered and sent after the commit, heard on one LISTEN connection per process.

NOTIFY inside an append's transaction would make all appends of a database commit one after the other. So the process
that appended announces the append afterwards; what gathers while an announcement is under way goes with the next one.
What is lost (a process dies in between, a connection breaks) is found by followers: they read after some silence.

All of a deployment's news go over one channel, named like its schema. PostgreSQL lets every role that may connect hear
it and write to it, so nothing in it is believed, and nothing of a session shows in it (P14). A payload is a first line
with the sender's name, then one line for each log with news: its key, which says "read". What follows a space in a line
is passed over: there 0.1 has the events. A line that begins with a space says to everybody: read.

A connection that has gone silently dead looks like one on which nothing happens; so while anything is watched, the
process sends itself payloads without news, each with a number drawn for it, and expects to hear them. They leave by
another connection, which also finds a server that is no longer the one that others announce at.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from nonstick.errors import NonstickError, StoreUnavailable
from nonstick.store import News, Wake
from nonstick.stores.common.backoff import backoff
from nonstick.stores.common.watches import Watches
from nonstick.stores.postgres.pool import TROUBLE, connect, refusal
from nonstick.stores.postgres.url import Address
from nonstick.waiting import background

if TYPE_CHECKING:
    from nonstick.stores.postgres.pool import Connection

__all__ = ["MAX_PAYLOAD", "Announcer", "NewsReader", "Wakes", "pack"]

logger = logging.getLogger("nonstick.store")

MAX_PAYLOAD: Final = 7_999
"""Bytes that PostgreSQL lets through."""

_MAX_PAYLOADS: Final = 32
"""Payloads of one transaction, which holds a lock that every process needs to announce."""

_MAX_WAITING: Final = 10_000
"""News that may wait for the server. Beyond that everybody is told to read."""

_EVERYBODY: Final = " "

_EVERYBODY_SECONDS: Final = 0.2
"""Seconds, at least, between two times that every watch is told to read: any role may ask for that, and it costs in
proportion to the watches."""

_PROOF: Final = "!"
"""Begins what a process sends to itself. No key does."""


def pack(sender: str, keys: Iterable[str]) -> tuple[list[str], int]:
    """Payloads for the first of these keys, and how many those are."""
    payloads: list[str] = []
    parts, size = [sender], len(sender)
    taken = 0
    for key in keys:
        if size + 1 + len(key) > MAX_PAYLOAD:
            payloads.append("\n".join(parts))
            parts, size = [sender], len(sender)
            if len(payloads) == _MAX_PAYLOADS:
                return payloads, taken
        taken += 1
        parts.append(key)
        size += 1 + len(key)
    payloads.append("\n".join(parts))
    return payloads, taken


class Wakes:
    """Wakes the watches of this process at once, and tells the other processes what this one did.

    Args:
        address: Of the server itself, past any pooler.
        notify: Sends payloads in one transaction; may raise StoreUnavailable.
        connect_timeout: Seconds.
        interval: Seconds between two proofs of life: see `NewsReader`.
    """

    def __init__(
        self,
        address: Address,
        *,
        notify: Callable[[list[str]], Awaitable[Any]],
        connect_timeout: float,
        interval: float,
    ) -> None:
        self._announcer = Announcer(notify)
        self._reader = NewsReader(address, self._announcer, connect_timeout=connect_timeout, interval=interval)

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        """See `Store.watch`."""
        return self._reader.watch(key, wake)

    def announce(self, key: str, news: News | None) -> None:
        """This process appended these events. None: it ended the session, or may have appended."""
        self._reader.announce(key, news)
        self._announcer.announce(key)

    async def close(self, timeout: float) -> None:
        """Ends every watch. What waits is announced still, if that is possible within these seconds."""
        await self._reader.close()
        await self._announcer.close(timeout)


class Announcer:
    """Tells the other processes what this one has appended, in order, as soon as it can.

    Args:
        notify: Sends payloads in one transaction; may raise StoreUnavailable.
    """

    def __init__(self, notify: Callable[[list[str]], Awaitable[Any]]) -> None:
        self.sender = secrets.token_hex(8)
        self._notify = notify
        self._keys: dict[str, None] = {}
        """Of the logs with news that were not announced yet, each once, in order."""
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def announce(self, key: str) -> None:
        """Something happened to this log."""
        if len(self._keys) >= _MAX_WAITING:
            self._keys = {_EVERYBODY: None}
        self._keys[key] = None
        if self._task is None and not self._closed:
            self._task = background.spawn(self._run(), name="nonstick: announce on PostgreSQL")

    async def send_to_self(self, proof: str) -> bool:
        """Sends a payload that has this proof in place of news. Returns whether it was sent."""
        try:
            await self._notify([f"{self.sender}\n{_PROOF}{proof}"])
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
        while self._keys:
            payloads, taken = pack(self.sender, self._keys)
            waiting = list(self._keys)
            sent, self._keys = waiting[:taken], dict.fromkeys(waiting[taken:])
            try:
                await self._notify(payloads)
                failures = 0
            except StoreUnavailable:
                self._keys = dict.fromkeys((*sent, *self._keys))
                failures += 1
                await asyncio.sleep(backoff(failures))
        self._task = None


class NewsReader:
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
        self._watches = Watches[News]()
        self._in_force = False
        self._telling: asyncio.TimerHandle | None = None
        """Will tell everybody to read."""
        self._told_at = -math.inf
        self._proof = ""
        self._heard = False
        """Whether what this process sent itself last came back."""
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        watch, stop = self._watches.add(key, wake)
        if self._in_force:
            watch.call_soon(None)
        if self._task is None and not self._closed:
            self._task = background.spawn(self._run(), name="nonstick: listen to PostgreSQL")
        return stop

    def announce(self, key: str, news: News | None) -> None:
        """Wakes the watches for what this process did itself."""
        self._watches.announce(key, news)

    async def close(self) -> None:
        self._closed = True
        self._watches.clear()
        if self._telling is not None:
            self._telling.cancel()
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
            self._heard, self._proof = False, secrets.token_hex(8)
            sent = not self._watches or await self._announcer.send_to_self(self._proof)
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
            self._heard = self._heard or body == _PROOF + self._proof
            return
        if not self._watches:
            return
        if body.startswith(_EVERYBODY) or "\n" + _EVERYBODY in body:
            self._tell_everybody()
            return
        for key in {line.partition(" ")[0] for line in body.split("\n")}:
            self._watches.announce(key, None)

    def _tell_everybody(self) -> None:
        loop = asyncio.get_running_loop()

        def tell() -> None:
            self._telling, self._told_at = None, loop.time()
            self._watches.announce_all()

        if self._telling is None:
            self._telling = loop.call_at(max(loop.time(), self._told_at + _EVERYBODY_SECONDS), tell)
