"""How the process of a node ends: on a signal, or because a handler told it to exit; the node drains first (P8, P16).

uvicorn tells the lifespan of its stop only after the last stream was closed, which is what has to be begun. So a node
chains the host's handlers of signals.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, NoReturn

import uvicorn

from nonstick.waiting.tasks import Exit

__all__ = ["draining_on_signals", "end_loop", "exit_status", "is_the_end", "note_exit", "stop_host"]

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

_Handler = Callable[[int, FrameType | None], Any]


class _Chained:
    """A handler of a signal that begins a drain, then does what the host does on it.

    Attributes:
        host: The host's own handler, behind those of further nodes in this process.
    """

    def __init__(self, begin: Callable[[], None], before: _Handler) -> None:
        self._begin = begin
        self._before = before
        self.host: _Handler = before.host if isinstance(before, _Chained) else before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._begin()
        self._before(number, frame)

    def begin_all(self) -> None:
        """Has every node in this process drain, as on the signal."""
        self._begin()
        if isinstance(self._before, _Chained):
            self._before.begin_all()


@contextmanager
def draining_on_signals(begin_drain: Callable[[], None]) -> Iterator[None]:
    """Begins the drain on SIGTERM and SIGINT, then does what the host does on them (P8)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def begin() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(begin_drain)

    chained: dict[signal.Signals, tuple[_Chained, _Handler]] = {}
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler):
            chained[number] = _Chained(begin, handler), handler
            signal.signal(number, chained[number][0])
    try:
        yield
    finally:
        for number, (ours, handler) in chained.items():
            if signal.getsignal(number) is ours:
                signal.signal(number, handler)


def stop_host() -> bool:
    """Has the host of this process stop, as on SIGTERM. Whether it can be told so."""
    handler = signal.getsignal(signal.SIGTERM)
    if not isinstance(handler, _Chained):
        return False
    server = getattr(handler.host, "__self__", None)
    if isinstance(server, uvicorn.Server):
        # Not by the signal itself, which it would raise again at its end: the process is to end with another status.
        handler.begin_all()
        server.should_exit = True
    else:
        signal.raise_signal(signal.SIGTERM)
    return True


_status = 0


def note_exit(error: Exit) -> None:
    """Remembers with which status the process is to end, for the code that ends it by force."""
    global _status
    code = getattr(error, "code", None)
    _status = code if isinstance(code, int) else 0 if code is None else 1


def exit_status() -> int:
    """The status that a handler in this process said; 0 if none did."""
    return _status


_is_the_end = False


def is_the_end() -> bool:
    """Whether all is done that was to be done before a handler's exit ends the event loop."""
    return _is_the_end


def end_loop(error: Exit, after: asyncio.Task[Any] | None = None) -> None:
    """Has the event loop end with this error, so that the process ends as the handler wanted it to.

    Args:
        after: What is to be done first. Code that waits for that task has time to return, but not to wait again.
    """
    loop = asyncio.get_running_loop()

    def end() -> NoReturn:
        global _is_the_end
        _is_the_end = True
        raise error

    if after is None:
        loop.call_soon(end)
    else:
        # Two rounds of the loop later: in the first one uvicorn returns, which ends the loop in the second.
        after.add_done_callback(lambda _: loop.call_soon(end))
