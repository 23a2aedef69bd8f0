"""Session state for requests that run at once: each change is one step in the store, whichever node makes it.

The same data as `Connection.state`: a key is the record's field `state:<key>`. A change is a compare-and-set on that
field and on the field `changed`, which counts changes and holds marks of the latest: where the store's answer was
lost, they tell whether this one is among them, so that it is made once.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import anyio.lowlevel

from nonstick.core.record import CHANGED, STATE, parse_changed
from nonstick.core.values import SessionState, check_size, to_json
from nonstick.errors import NoSession, SessionNotFound, StoreUnavailable
from nonstick.log.guard import GuardedStore, withheld
from nonstick.session.live import LiveSession, current_session

__all__ = ["State", "change_fields", "discreet", "save", "session_state"]

logger = logging.getLogger(__name__)

_MARKS: Final = 32
"""Marks that a record keeps: more changes than one session has under way at once."""


def session_state() -> State:
    """The state of the session that the current request or notification is part of, for changes that may race.

    Raises:
        NoSession: Not inside a handler or middleware of a session.
    """
    session = current_session()
    if session is None:
        raise NoSession(
            "there is no session here: session_state() works in handlers of requests that belong to a session. Those "
            "of 2026-07-28 clients, and of a stateless server, belong to none: keep their state in requestState, or in "
            "a database of your own"
        )
    return State(session)


class State:
    """One session's state. Values are JSON, keys 1 to 256 printable ASCII characters.

    What a method wrote is in the store when it returns, and shows in `Connection.state` on this node; on another node
    with the next request there. What was put into `Connection.state` here, and is not saved yet, counts as set before.

    Raises:
        StoreUnavailable: From each method. Whether a change was made is unknown then.
        SessionNotFound: From each method: the session has ended.
    """

    def __init__(self, session: LiveSession) -> None:
        self._session = session

    async def get(self, key: str, default: Any = None) -> Any:
        """A copy of the value that the store has now; `default` for a key without a value."""
        if self._local is not None:
            return _copy(key, self._local.get(key, default))
        fields = await self._load()
        value = self._value(key, fields)
        return default if value is _ABSENT else _copy(key, value)

    async def set(self, key: str, value: Any) -> None:
        """Gives the key this value, whatever it had.

        Raises:
            StateNotJSON: JSON cannot hold it.
            StateTooLarge: The session's state would be larger than `max_state_bytes`.
        """
        to_json(key, value)
        await self._change(key, lambda _: value)

    async def delete(self, key: str) -> bool:
        """Removes the key. Whether it was there."""
        return await self._change(key, lambda _: _ABSENT) is not _ABSENT

    async def increment(self, key: str, by: float = 1) -> Any:
        """Adds to a number and returns the sum. A key without a value counts as 0. Of increments at once none is lost.

        Raises:
            TypeError: The value is no number.
            StateTooLarge: As `set`.
        """
        total: float = 0

        def add(old: Any) -> float:
            nonlocal total
            old = 0 if old is _ABSENT or old is None else old
            if isinstance(old, bool) or not isinstance(old, int | float):
                raise TypeError(f"session state {key!r} holds a {type(old).__name__}, which cannot be incremented")
            total = old + by
            return total

        await self._change(key, add)
        return total

    async def compare_and_set(self, key: str, expected: Any, new: Any) -> bool:
        """Gives the key the value `new` if it has the value `expected`, in one step. Whether it had.

        `None` as `expected` also means that the key is not there. 1 and 1.0 are two values, as in JSON.

        Raises:
            StateNotJSON, StateTooLarge: As `set`.
        """
        to_json(key, expected)
        to_json(key, new)
        wanted = _canonical(expected)

        def choose(old: Any) -> Any:
            if _canonical(None if old is _ABSENT else old) != wanted:
                raise _Differs
            return new

        try:
            await self._change(key, choose)
        except _Differs:
            return False
        return True

    # ---- inside

    @property
    def _local(self) -> dict[str, Any] | None:
        """The state itself, where only this node has it: it is held here, or the session is just being opened."""
        state = self._session.connection.state
        return state if self._session.opening is not None or not isinstance(state, SessionState) else None

    async def _change(self, key: str, decide: Callable[[Any], Any]) -> Any:
        """Replaces the value by what `decide` makes of it, and returns what it was. `decide` may be called again."""
        if (local := self._local) is not None:
            old = local.get(key, _ABSENT)
            new = decide(old)
            if new is _ABSENT:
                local.pop(key, None)
            else:
                local[key] = _copy(key, new)
            return old
        # One at a time on each node: they would only make each other try again.
        async with self._session.state.changing:
            return await self._change_stored(key, decide)

    async def _change_stored(self, key: str, decide: Callable[[Any], Any]) -> Any:
        session, name, mark = self._session, STATE + key, secrets.token_hex(4).encode()
        old: Any = _ABSENT
        adopted: tuple[bytes | None, int] = None, 0

        def changes(fields: Mapping[str, bytes]) -> dict[str, bytes | None]:
            nonlocal old, adopted
            count, marks = parse_changed(fields.get(CHANGED))
            if mark in marks:  # it was written, and the answer lost
                adopted = fields.get(name), count
                return {}
            old = self._value(key, fields)
            new = decide(old)
            data = None if new is _ABSENT else to_json(key, new)
            stored = {name: data for name, data in fields.items() if name.startswith(STATE)}
            check_size(stored, {name: data}, session.services.settings.max_state_bytes)
            adopted = data, count + 1
            return {name: data, CHANGED: b" ".join([b"%d" % (count + 1), *marks[1 - _MARKS :], mark])}

        async with self._told():
            await change_fields(session.services.store, session.key, changes)
        session.state.adopt(key, *adopted)
        return old

    def _value(self, key: str, fields: Mapping[str, bytes]) -> Any:
        """The value of now: what was put into `Connection.state` here, else what the store has."""
        if (unsaved := self._session.state.unsaved(key)) is not None:
            return unsaved[0] if unsaved else _ABSENT
        stored = fields.get(STATE + key)
        return _ABSENT if stored is None else json.loads(stored)

    async def _load(self) -> Mapping[str, bytes]:
        async with self._told():
            return (await self._session.services.store.load(self._session.key, renew=False)).fields

    @asynccontextmanager
    async def _told(self) -> AsyncIterator[None]:
        """What the store says is told to the handler. That the session has ended cancels the handler first (P6)."""
        try:
            with discreet():
                yield
        except SessionNotFound:
            self._session.end_soon()
            await anyio.lowlevel.checkpoint()
            raise


async def save(session: LiveSession) -> None:
    """Stores the session state that changed here.

    Raises:
        StateNotJSON, StateTooLarge: As `SessionState.changes`.
        SessionNotFound, StoreUnavailable: As `Store.update`.
    """
    if session.state.changes():
        async with session.state.changing:
            changes = session.state.changes()
            await session.services.store.update(session.key, changes)
            session.state.saved(changes)


async def change_fields(
    store: GuardedStore, key: str, decide: Callable[[Mapping[str, bytes]], Mapping[str, bytes | None]]
) -> None:
    """Changes fields of a record by compare-and-set: again, for as long as others change the same fields in between.

    Args:
        decide: Makes of the record's fields the changes, with None for a field that is to go; nothing if there is
            nothing to do. What it raises ends the change.

    Raises:
        SessionNotFound, StoreUnavailable: As `Store.load` and `Store.update`.
    """
    while True:
        fields = (await store.load(key, renew=False)).fields
        changes = decide(fields)
        if not changes or await store.update(key, changes, expect={name: fields.get(name) for name in changes}):
            return
        await anyio.lowlevel.checkpoint()


@contextmanager
def discreet() -> Iterator[None]:
    """Handlers pass on to their clients what they get, and what the store said may name its host (P13)."""
    try:
        yield
    except StoreUnavailable as error:
        raise withheld(error, "session state") from None


class _Absent:
    """There is no such key."""


class _Differs(Exception):
    """The value is not the expected one."""


_ABSENT: Final = _Absent()


def _copy(key: str, value: Any) -> Any:
    """So that nobody changes the kept one by changing theirs."""
    return json.loads(to_json(key, value)) if isinstance(value, dict | list | tuple) else value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
