"""The event loop of `nonstick serve`, which goes on where a task tells the process to exit (P8, P16).

asyncio raises the `SystemExit` of any task out of the loop at once, also of a task that a handler began. Then no client
would be answered any more. This loop has the node drain first, as the node does where the handler itself exits.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Generator
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nonstick.node.exits import is_the_end
from nonstick.node.node import exit_in

__all__ = ["Loop"]

T = TypeVar("T")

if TYPE_CHECKING:
    from asyncio import SelectorEventLoop as _Fastest
elif sys.platform == "win32":
    from asyncio import ProactorEventLoop as _Fastest
else:
    # As uvicorn chooses.
    try:
        from uvloop import Loop as _Fastest
    except ImportError:
        from asyncio import SelectorEventLoop as _Fastest


class Loop(_Fastest):
    """The fastest loop that is installed."""

    def run_until_complete(self, future: Generator[Any, None, T] | Awaitable[T]) -> T:
        """Runs until `future` is done, whichever other task says meanwhile that the process is to end."""
        task = asyncio.ensure_future(cast("Awaitable[T]", future), loop=self)
        while True:
            try:
                return super().run_until_complete(task)
            except (SystemExit, KeyboardInterrupt) as error:
                if task.done() or is_the_end() or not exit_in(self, error):
                    raise
