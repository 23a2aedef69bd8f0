"""One multiplexed connection to a Redis-compatible server: a FIFO of futures over one socket.

All callers of a process share the socket. The server answers in the order in which it was asked, so the n-th reply
belongs to the n-th waiting future, whatever has become of its caller. Rules that everything here keeps:

* A command is written at most once. Whether to repeat one is the caller's decision (an append carries its writer's
  sequence for that).
* A caller that gave up, by a deadline or by cancellation, leaves its place in the FIFO: the reply is dropped when it
  comes, and its neighbours' replies stay theirs.
* A connection on which nothing arrives although commands wait is a black hole, and is torn down.
* What waits is bounded, by number and by bytes. Beyond that a call fails at once.

docs/why/own-redis-connection.md says why this is not redis-py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn

from nonstick.errors import StoreUnavailable, StoreUnusable
from nonstick.stores.common.backoff import backoff
from nonstick.stores.redis.replies import Demoted, ServerError, refusal
from nonstick.stores.redis.sockets import Arg, Socket, ignore, open_socket, pack
from nonstick.stores.redis.unanswered import Unanswered
from nonstick.stores.redis.url import Address
from nonstick.waiting import background

__all__ = ["Connection"]

logger = logging.getLogger("nonstick.store")

_ASKING: Final = pack(("ASKING",))
_SWEEP_SECONDS: Final = 0.05
"""Between two looks for deadlines that have passed."""


class Connection:
    """Calls to one server over one socket, which is opened by the first call and again after a loss.

    Args:
        timeout: Seconds that a call waits for its reply, connecting included, unless it says otherwise. Kept to
            within a twentieth of a second. Also the silence after which waiting commands mean a black hole.
        connect_timeout: Seconds for the socket, TLS and login together.
        max_waiting: Commands that may be unanswered, those given up on included.
        max_bytes: Bytes of these commands.
        open: Gives a socket to the right server instead, where that is to be found out each time; raises
            StoreUnavailable. The address then only names the place in messages.

    Attributes:
        losses: How often an open connection was lost. If it is the same before a command was sent and after its
            reply, what is sent then goes over the very same socket.
    """

    def __init__(
        self,
        address: Address,
        *,
        name: str = "",
        timeout: float = 2.0,
        connect_timeout: float = 2.0,
        max_waiting: int = 10_000,
        max_bytes: int = 64 * 1024 * 1024,
        open: Callable[[], Awaitable[Socket]] | None = None,  # noqa: A002
    ) -> None:
        self._address = address
        self._open = open or (lambda: open_socket(address, name=name, timeout=connect_timeout))
        self.losses = 0
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._unanswered = Unanswered(max_waiting=max_waiting, max_bytes=max_bytes)
        self._attempts = _Attempts()
        self._socket: Socket | None = None
        self._given_up: Socket | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._asked_at = 0.0
        self._closed = False

    @property
    def is_idle(self) -> bool:
        """Nothing waits for a reply."""
        return not self._unanswered.waiting

    async def call(self, *args: Arg, timeout: float | None = None) -> Any:
        """The server's reply to this command: bytes, int, list or None.

        Raises:
            StoreUnavailable: There is none: see the module. The command may have been executed or not, except
                where the server refused it.
        """
        return await self.send(args, timeout)

    async def send_each(self, commands: Sequence[tuple[Arg, ...]], timeout: float | None = None) -> list[Any]:
        """The replies to these commands, one at least, which go together and cost little more than one call.

        In place of a reply that is an error there is what `call` would raise.

        Raises:
            StoreUnavailable: The connection was lost, or the time is over, before all of them were answered.
        """
        *before, last = commands
        told: list[Any] = []
        try:
            told.append(await self.send(last, timeout, before=before, told=told))
        except StoreUnavailable as error:
            if len(told) < len(before):
                raise
            told.append(error)
        return [refusal(str(reply)) if isinstance(reply, ServerError) else reply for reply in told]

    def send(
        self,
        args: tuple[Arg, ...],
        timeout: float | None = None,
        *,
        asking: bool = False,
        before: Sequence[tuple[Arg, ...]] = (),
        told: list[Any] | None = None,
    ) -> asyncio.Future[Any]:
        """Like `call`, but returns the future of the reply. Commands are executed in the order of the sends.

        With `asking` ASKING goes before it, so that a server which is only just receiving the slot executes it. The
        two are never parted: an ASKING alone would have somebody else's command see half of a session.

        Args:
            before: Commands that go before it. They wait with it, as one.
            told: Takes the replies to these as they come, errors too; without it they are dropped.

        Raises:
            StoreUnavailable: At once, if too much is waiting already, or after `close`.
        """
        packed = _ASKING + pack(args) if asking else pack(args)
        replies = 1 + asking
        if before:
            packed = b"".join((*map(pack, before), packed))
            replies += len(before)
        unanswered, loop = self._unanswered, self._loop
        now = loop.time()
        if not unanswered.waiting:
            self._asked_at = now
        future: asyncio.Future[Any] = loop.create_future()
        deadline = now + (self._timeout if timeout is None else timeout)
        if self._closed or not unanswered.add(future, deadline, len(packed), replies, told):
            self._refuse()
        if self._socket is not None:
            self._socket.write(packed)
        else:
            unanswered.unwritten.append(packed)
            if self._connecting is None:
                self._connecting = background.spawn(self._connect(), name="nonstick-redis-connect")
        if self._timer is None:
            self._timer = background.later(_SWEEP_SECONDS, self._sweep)
        return future

    def reopen(self, reason: str) -> None:
        """Gives the socket up, and with it what waits for replies. The next call opens another."""
        socket = self._socket
        if socket is not None:
            # At once: what is called from here on must not be written to it.
            socket.on_reply = socket.on_lost = ignore
            socket.abort(reason)
            self._given_up = socket
            self._on_lost(reason)

    async def close(self) -> None:
        """Closes the socket. Whatever still waits fails; nothing is left running."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        socket = self._socket
        if socket is not None:
            socket.abort("the store was closed")
            await socket.closed
        if self._given_up is not None:
            await self._given_up.closed
        self._unanswered.fail("the store was closed")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self) -> NoReturn:
        if self._closed:
            raise StoreUnavailable("the store was closed")
        raise StoreUnavailable(f"{self._address.url} is too slow: too much is waiting for it")

    # ---- the socket

    async def _connect(self) -> None:
        """Opens the socket, after a pause if that just failed; then everything that waits is written.

        A failed attempt fails what has waited through all of it. What came later gets an attempt of its own: it must
        not fail for a fault that may have been over when it was asked.
        """
        socket: Socket | None = None
        while socket is None and self._unanswered.waiting:
            if self._attempts.failures:
                await asyncio.sleep(self._attempts.next_at - self._loop.time())
            known = len(self._unanswered.waiting)
            try:
                socket = await self._open()
            except StoreUnavailable as error:
                self._attempts.failed(error, at=self._loop.time())
                self._unanswered.fail(str(error), known, kind=_kind(error))
        self._connecting = None
        if socket is not None:
            self._attempts = _Attempts()
            self._adopt(socket)

    def _adopt(self, socket: Socket) -> None:
        socket.on_reply, socket.on_lost = self._on_reply, self._on_lost
        self._socket = socket
        self._asked_at = self._loop.time()
        for packed in self._unanswered.to_write():
            socket.write(packed)
        # The socket may have died between the login's last reply and here: then nobody has told us.
        if socket.closed.done():
            self._on_lost("the store closed the connection")

    def _on_reply(self, reply: Any) -> None:
        if not self._unanswered.waiting:
            assert self._socket is not None
            self._socket.abort("the store sent a reply that nobody had asked for")
            return
        future = self._unanswered.answered(reply)
        if future is None:
            return
        if isinstance(reply, ServerError):
            self._on_refusal(future, refusal(str(reply)))
        elif not future.done():
            future.set_result(reply)

    def _on_refusal(self, future: asyncio.Future[Any], error: StoreUnavailable) -> None:
        if not future.done():
            future.set_exception(error)
        if isinstance(error, Demoted):
            # The primary is elsewhere now: behind the same name, or where the Sentinels say.
            self.reopen("it is a replica now")

    def _on_lost(self, reason: str) -> None:
        self._socket = None
        self.losses += 1
        if not self._closed:
            logger.warning("lost the connection to %s: %s", self._address.url, reason)
        self._unanswered.fail(f"lost the connection to {self._address.url}: {reason}")

    def _sweep(self) -> None:
        """Fails what is past its deadline, and tears a black hole down. One timer for all, only while some wait."""
        self._timer = None
        if not self._unanswered.waiting:
            return
        now = self._loop.time()
        socket = self._socket
        if socket is not None and now - max(socket.heard_at, self._asked_at) >= self._timeout:
            socket.abort(f"nothing was heard for {self._timeout:g} s")
        self._unanswered.expire(now, self._late)
        self._timer = background.later(_SWEEP_SECONDS, self._sweep)

    def _late(self) -> StoreUnavailable:
        """What to raise after a deadline, which may be shorter than an attempt to connect: how the last one ended."""
        return self._attempts.unusable() or StoreUnavailable(f"{self._address.url} did not answer in time")


class _Attempts:
    """How the attempts to open a socket went since the last one that did not fail.

    Attributes:
        failures: How many there were, one after the other.
        next_at: Loop time of the next one.
    """

    def __init__(self) -> None:
        self.failures = 0
        self.next_at = 0.0
        self._unusable = ""

    def failed(self, error: StoreUnavailable, *, at: float) -> None:
        self.failures += 1
        self.next_at = at + backoff(self.failures)
        self._unusable = str(error) if isinstance(error, StoreUnusable) else ""

    def unusable(self) -> StoreUnusable | None:
        """Why the store will not do, if the last attempt found that out."""
        return StoreUnusable(self._unusable) if self._unusable else None


def _kind(error: StoreUnavailable) -> type[StoreUnavailable]:
    return StoreUnusable if isinstance(error, StoreUnusable) else StoreUnavailable
