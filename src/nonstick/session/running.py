"""What a session, and the node's drain, know of a request that runs here."""

from __future__ import annotations

from typing import Protocol

from mcp_types import ErrorData

from nonstick.store import Cursor, Event

__all__ = ["Answering", "Running"]


class Answering(Protocol):
    """The answer to a request that runs here, on its way to the client."""

    began: float
    """When, in the loop's time, as far as that matters: not while the window lasts."""

    def shows_client(self, now: float, /) -> bool:
        """Whether the client is there, as far as its connection tells."""
        ...

    def hand_over(self) -> None:
        """Closes the client's connection, if it can come back for the rest."""
        ...


class Running(Protocol):
    """A request of a client's that runs on this node."""

    head: Cursor
    """The log's head when its record was loaded: what came later may concern this request."""

    @property
    def stream(self) -> int:
        """The position of its stream's first event; 0 while it is none."""
        ...

    # ---- what the log brings

    def observe(self, event: Event, /) -> None:
        """The log brought something on this request's stream that may not be of its own making."""
        ...

    def show_life(self) -> None:
        """Says in the log that the request still runs; finds out, so, whether the store has all of its stream (P9)."""
        ...

    # ---- what stops it

    def cancel(self) -> None:
        """The client cancelled it (P5)."""
        ...

    def end(self) -> None:
        """The session ended (P6)."""
        ...

    def fence(self, error: ErrorData, /) -> None:
        """The session has another owner now: nothing that this request does counts any more (P7)."""
        ...

    def fail(self, error: ErrorData, /) -> None:
        """It is ended from this side, with this error."""
        ...

    async def abandon(self) -> None:
        """Ends the request without its handler, which did not stop when it was told to."""
        ...

    # ---- its client

    @property
    def answer(self) -> Answering:
        """What the client gets."""
        ...

    def disconnect_client(self) -> None:
        """Closes the HTTP response without a terminal event. A client that resumes the stream gets it elsewhere."""
        ...
