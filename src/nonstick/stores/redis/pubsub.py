"""Subscriptions to a Redis-compatible server, on a connection of their own, that outlive every interruption.

What is published may be lost; that something *may* have been lost is always told: every watch is woken with None when
its subscription comes into force, the first time and after each interruption.

A subscription that has gone silently dead looks like one on which nothing happens. So while anything is watched, the
connection is pinged, and a message to a channel of its own goes round through the *other* connection: that also finds
a server that still answers here but is no longer the one that others publish at.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from nonstick.errors import StoreUnavailable
from nonstick.stores.common.backoff import backoff
from nonstick.stores.common.watches import Watches
from nonstick.stores.redis.replies import ServerError, is_alive, refusal
from nonstick.stores.redis.sockets import Socket, ignore, open_socket, pack
from nonstick.stores.redis.url import Address
from nonstick.waiting import background

__all__ = ["Subscriber"]

logger = logging.getLogger("nonstick.store")

T = TypeVar("T")


class Subscriber(Generic[T]):
    """Watches of channels, any number of them per channel. Connects while there are any.

    Args:
        prefix: Of the channel that this instance sends to itself.
        decode: What a payload means; None for "something happened".
        publish: Publishes to a channel through another connection; may raise StoreUnavailable. None where nothing can
            be published: then only PING proves that the server lives.
        open: Gives a socket to the right server instead, where that is to be found out each time; raises
            StoreUnavailable. The address then only names the place in messages.
        interval: Seconds between two proofs of life. An interruption is noticed within two of them.
    """

    def __init__(
        self,
        address: Address,
        *,
        name: str = "",
        prefix: str,
        decode: Callable[[bytes], T | None],
        publish: Callable[[str], Awaitable[Any]] | None = None,
        open: Callable[[], Awaitable[Socket]] | None = None,  # noqa: A002
        connect_timeout: float = 2.0,
        interval: float = 3.0,
    ) -> None:
        self._address = address
        self._open = open or (lambda: open_socket(address, name=name, timeout=connect_timeout))
        self._own = f"{prefix}:!{secrets.token_hex(8)}"
        self._decode = decode
        self._publish = publish
        self._interval = interval
        self._watches = Watches[T]()
        self._in_force: set[str] = set()
        self._wanted = asyncio.Event()
        self._socket: Socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._ponged = self._heard = True

    def watch(self, channel: str, wake: Callable[[T | None], None]) -> Callable[[], None]:
        """Has `wake` called from now on, first with None once the subscription is in force. Returns what stops it."""
        if channel not in self._watches:
            self._command("SUBSCRIBE", channel)
        watch, stop = self._watches.add(channel, wake)
        if channel in self._in_force:
            watch.call_soon(None)
        self._wanted.set()
        if self._task is None and not self._closed:
            self._task = background.spawn(self._run(), name="nonstick-redis-subscriber")
        return lambda: self._stop(channel, stop)

    def reopen(self) -> None:
        """Subscribes anew, over another connection."""
        if self._socket is not None:
            self._socket.abort("another server is the primary now")

    async def close(self) -> None:
        """Ends every watch and the connection; nothing is left running."""
        self._closed = True
        self._watches.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _stop(self, channel: str, stop: Callable[[], None]) -> None:
        was_watched = channel in self._watches
        stop()
        if was_watched and channel not in self._watches:
            self._in_force.discard(channel)
            self._command("UNSUBSCRIBE", channel)
            if not self._watches:
                self._wanted.clear()

    def _command(self, *args: str) -> None:
        # Without a connection there is nothing to do: the next one starts with all subscriptions.
        if self._socket is not None:
            self._socket.write(pack(args))

    # ---- the connection

    async def _run(self) -> None:
        failures = 0
        while True:
            await self._wanted.wait()
            try:
                socket = await self._open()
            except StoreUnavailable as error:
                if not failures:
                    logger.warning("no subscription at %s: %s", self._address.url, error)
                failures += 1
                await asyncio.sleep(backoff(failures))
                continue
            failures = 0
            try:
                await self._serve(socket)
            finally:
                self._socket = None
                self._in_force.clear()
                socket.on_lost = ignore
                socket.abort("closed")
                await socket.closed
            # When a server goes down, not every node should be back in the same instant.
            await asyncio.sleep(backoff(0))

    async def _serve(self, socket: Socket) -> None:
        """Keeps all subscriptions in force until the connection is lost, seems dead, or nothing is watched."""
        socket.on_reply, socket.on_lost = self._on_reply, self._on_lost
        self._socket = socket
        self._ponged = self._heard = True
        own = () if self._publish is None else (self._own,)
        for name in (*own, *self._watches):
            self._command("SUBSCRIBE", name)
        unheard = 0
        while self._watches and not socket.closed.done():
            if not self._ponged or unheard > 1:
                logger.warning("the subscription at %s is silent: connecting anew", self._address.url)
                return
            self._ponged = False
            self._command("PING")
            sent = await self._sent_to_self()
            await asyncio.wait([socket.closed], timeout=self._interval)
            unheard = 0 if self._heard or not sent else unheard + 1

    async def _sent_to_self(self) -> bool:
        if self._publish is None:
            return False
        self._heard = False
        try:
            await self._publish(self._own)
        except StoreUnavailable:
            return False
        return True

    def _on_lost(self, reason: str) -> None:
        logger.warning("lost the subscription at %s: %s", self._address.url, reason)

    def _on_reply(self, reply: Any) -> None:
        if isinstance(reply, ServerError) and is_alive(reply):
            self._ponged = True
            return
        if isinstance(reply, ServerError):
            logger.error("a subscription at %s was refused: %s", self._address.url, refusal(str(reply)))
            return
        kind, channel, body = (*reply, None)[:3] if isinstance(reply, list) else (b"pong", b"", None)
        if kind == b"message":
            self._on_message(channel.decode(), body)
        elif kind == b"subscribe":
            self._on_subscribed(channel.decode())
        elif kind == b"pong":
            self._ponged = True

    def _on_message(self, channel: str, body: bytes) -> None:
        if channel in self._watches:
            self._watches.announce(channel, self._decode(body))
        elif channel == self._own:
            self._heard = True

    def _on_subscribed(self, channel: str) -> None:
        if channel in self._watches:
            self._in_force.add(channel)
            self._watches.announce(channel, None)
