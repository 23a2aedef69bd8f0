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

from nonstick.errors import StoreUnavailable, without_text
from nonstick.stores.redis.connection import ServerError, Wire, backoff, is_alive, open_wire, pack, refusal
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
        open: Gives a wire to the right server instead, where that is to be found out each time; raises
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
        open: Callable[[], Awaitable[Wire]] | None = None,  # noqa: A002
        connect_timeout: float = 2.0,
        interval: float = 3.0,
    ) -> None:
        self._address = address
        self._open = open or (lambda: open_wire(address, name=name, timeout=connect_timeout))
        self._own = f"{prefix}:!{secrets.token_hex(8)}"
        self._decode = decode
        self._publish = publish
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._channels: dict[bytes, dict[object, Callable[[T | None], None]]] = {}
        self._in_force: set[bytes] = set()
        self._wanted = asyncio.Event()
        self._wire: Wire | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._ponged = self._heard = True

    def watch(self, channel: str, wake: Callable[[T | None], None]) -> Callable[[], None]:
        """Has `wake` called from now on, first with None once the subscription is in force. Returns what stops it."""
        name, token = channel.encode(), object()
        watchers = self._channels.get(name)
        if watchers is None:
            self._channels[name] = watchers = {}
            self._command("SUBSCRIBE", name)
        elif name in self._in_force:
            self._loop.call_soon(self._wake, name, token, None)
        watchers[token] = wake
        self._wanted.set()
        if self._task is None and not self._closed:
            self._task = background.spawn(self._run(), name="nonstick-redis-subscriber")
        return lambda: self._stop(name, token)

    def reopen(self) -> None:
        """Subscribes anew, over another connection."""
        if self._wire is not None:
            self._wire.abort("another server is the primary now")

    async def close(self) -> None:
        """Ends every watch and the connection; nothing is left running."""
        self._closed = True
        self._channels.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _stop(self, name: bytes, token: object) -> None:
        watchers = self._channels.get(name)
        if watchers is None or watchers.pop(token, None) is None or watchers:
            return
        del self._channels[name]
        self._in_force.discard(name)
        self._command("UNSUBSCRIBE", name)
        if not self._channels:
            self._wanted.clear()

    def _command(self, *args: str | bytes) -> None:
        # Without a connection there is nothing to do: the next one starts with all subscriptions.
        if self._wire is not None:
            self._wire.write(pack(args))

    # ---- the connection

    async def _run(self) -> None:
        failures = 0
        while True:
            await self._wanted.wait()
            try:
                wire = await self._open()
            except StoreUnavailable as error:
                if not failures:
                    logger.warning("no subscription at %s: %s", self._address.url, error)
                failures += 1
                await asyncio.sleep(backoff(failures))
                continue
            failures = 0
            try:
                await self._serve(wire)
            finally:
                self._wire = None
                self._in_force.clear()
                wire.on_lost = lambda _: None
                wire.abort("closed")
                await wire.closed
            # When a server goes down, not every node should be back in the same instant.
            await asyncio.sleep(backoff(0))

    async def _serve(self, wire: Wire) -> None:
        """Keeps all subscriptions in force until the connection is lost, seems dead, or nothing is watched."""
        wire.on_reply, wire.on_lost = self._on_reply, self._on_lost
        self._wire = wire
        self._ponged = self._heard = True
        own = () if self._publish is None else (self._own.encode(),)
        for name in (*own, *self._channels):
            self._command("SUBSCRIBE", name)
        unheard = 0
        while self._channels and not wire.closed.done():
            if not self._ponged or unheard > 1:
                logger.warning("the subscription at %s is silent: connecting anew", self._address.url)
                return
            self._ponged = False
            self._command("PING")
            sent = await self._sent_to_self()
            await asyncio.wait([wire.closed], timeout=self._interval)
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
        kind, name, body = (*reply, None)[:3] if isinstance(reply, list) else (b"pong", b"", None)
        if kind == b"message":
            self._on_message(name, body)
        elif kind == b"subscribe" and name in self._channels:
            self._in_force.add(name)
            self._wake_all(name, None)
        elif kind == b"pong":
            self._ponged = True

    def _on_message(self, name: bytes, body: bytes) -> None:
        if name in self._channels:
            self._wake_all(name, self._decode(body))
        elif name == self._own.encode():
            self._heard = True

    def _wake_all(self, name: bytes, hint: T | None) -> None:
        for token in tuple(self._channels.get(name, ())):
            self._wake(name, token, hint)

    def _wake(self, name: bytes, token: object, hint: T | None) -> None:
        """Wakes one watch, unless it was stopped meanwhile."""
        wake = self._channels.get(name, {}).get(token)
        if wake is not None:
            try:
                wake(hint)
            except Exception as error:
                # It must not raise. If it does, the other watches still get theirs.
                logger.error("a wake raised", exc_info=without_text(error))
