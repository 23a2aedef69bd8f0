"""uvicorn's HTTP protocols, which also say when their server stops without a signal (P8).

A server that is told `should_exit`, or has served `limit_max_requests`, waits for its connections before the
application hears of the stop, so open streams would hold the server for ever. At once the server only calls each
connection's `shutdown`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

from nonstick.node.drain import seconds_left_here
from nonstick.node.node import begin_drain_here

__all__ = ["Draining", "DrainingH11"]


_BEFORE_THE_END: Final = 0.5
"""How many seconds before the node has to be gone a connection is cut off that has not ended by itself."""


def _begin_drain(transport: asyncio.Transport) -> None:
    begin_drain_here()
    if seconds := seconds_left_here():
        # A connection that is closed waits until what was written is taken: for ever, if the client does not read.
        loop = asyncio.get_running_loop()
        loop.call_later(max(seconds - _BEFORE_THE_END, 0.0), transport.abort)


class DrainingH11(H11Protocol):
    """uvicorn's protocol in Python. Its server's stop begins the drain of what nonstick serves in this event loop."""

    def shutdown(self) -> None:
        _begin_drain(self.transport)
        super().shutdown()


if TYPE_CHECKING:
    Draining = DrainingH11
    """The fast one of the two that is installed: `uvicorn --http nonstick.protocols:Draining`."""
else:
    try:
        from nonstick.protocols.bounded_heads import BoundedHeads
    except ImportError:
        Draining = DrainingH11
    else:

        class Draining(BoundedHeads):
            """uvicorn's fast protocol, with bounds. Its server's stop begins the drain, as with `DrainingH11`."""

            def shutdown(self) -> None:
                _begin_drain(self.transport)
                super().shutdown()
