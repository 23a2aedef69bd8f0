"""A store that raises, on command, any error from any call, before or after it has done its work; or hangs."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Self

from nonstick import errors
from nonstick.errors import StoreError, TooManySessions, Trimmed
from nonstick.store import Store

CALLS: Final = tuple(
    name
    for name, method in vars(Store).items()
    if inspect.isfunction(method) and not name.startswith("_") and name != "lease"
)
"""Every method of the protocol, a lease's apart, whose calls block a thread of their own."""

WRITES: Final = ("create", "update", "append", "delete")
"""Those of which it matters whether they did their work."""

EVERYWHERE: Final = "*"
"""As key: of calls that concern no session in particular."""


def every_error() -> dict[str, type[StoreError]]:
    """Every error of a store that there is, by its name."""
    public = [getattr(errors, name) for name in errors.__all__]
    return {kind.__name__: kind for kind in public if issubclass(kind, StoreError)}


def make(kind: type[StoreError]) -> StoreError:
    """One such error."""
    if issubclass(kind, Trimmed):
        return Trimmed(1)
    return kind("all") if issubclass(kind, TooManySessions) else kind("on command")


@dataclass
class Fault:
    """What goes wrong: from the `nth` call of this method on.

    Attributes:
        error: What it raises; None if it hangs.
        after: It has done its work by then.
        seconds: For so long after the first time; 0 for once.
    """

    method: str
    nth: int
    error: type[StoreError] | None
    after: bool = False
    seconds: float = 0.0
    calls: int = 0
    fired: asyncio.Event = field(default_factory=asyncio.Event)
    lifted: asyncio.Event = field(default_factory=asyncio.Event)

    def strikes(self) -> bool:
        """Counts a call. Whether it goes wrong."""
        self.calls += 1
        if self.lifted.is_set() or self.calls < self.nth:
            return False
        if not self.fired.is_set():
            self.fired.set()
            if self.seconds:
                asyncio.get_running_loop().call_later(self.seconds, self.lifted.set)
        if not self.seconds:
            self.lifted.set()
        return True


class Commands:
    """The faults of all nodes' stores, by the key of the session that they concern."""

    def __init__(self) -> None:
        self.faults: dict[str, Fault] = {}
        self.opening: dict[bytes, str] = {}
        """Of sessions that are to be opened, what their clients call themselves, and a key for their faults."""
        self.counted: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """Calls of each method, by key."""

    def fault(self, name: str, args: tuple[Any, ...]) -> Fault | None:
        key = self._key(name, args)
        self.counted[key][name] += 1
        fault = self.faults.get(key)
        return fault if fault is not None and fault.method == name and fault.strikes() else None

    def _key(self, name: str, args: tuple[Any, ...]) -> str:
        if name == "create":
            client = args[1].get("client", b"")
            return next((key for mark, key in self.opening.items() if mark in client), args[0])
        return args[0] if args and isinstance(args[0], str) else EVERYWHERE


class CommandedStore:
    """One node's way to the store."""

    def __init__(self, store: Any, commands: Commands) -> None:
        self._store = store
        self._commands = commands

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in CALLS:
            return method
        return self._watch if name == "watch" else self._commanded(name, method)

    def _commanded(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*args: Any, **more: Any) -> Any:
            fault = self._commands.fault(name, args)
            if fault is None:
                return await method(*args, **more)
            if fault.after:
                await method(*args, **more)
            if fault.error is not None:
                raise make(fault.error)
            await asyncio.Event().wait()
            raise AssertionError

        return call

    def _watch(self, key: str, wake: Any) -> Callable[[], None]:
        fault = self._commands.fault("watch", (key,))
        if fault is not None and fault.error is not None:
            raise make(fault.error)
        stop: Callable[[], None] = self._store.watch(key, wake)
        return stop

    async def __aenter__(self) -> Self:
        await self._store.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._store.__aexit__(*error)
