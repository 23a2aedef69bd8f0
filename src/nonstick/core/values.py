"""Values of session state: what JSON can hold, how large they may be together, and which of them were changed here.

All three faces of session state go by this: `Connection.state`, `session_state()` (`session/state.py`), and what
FastMCP keeps (`cluster/state_store.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, SupportsIndex

from nonstick.core.record import STATE
from nonstick.errors import StateNotJSON, StateTooLarge

__all__ = ["SessionState", "check_size", "encoded", "to_json"]

LONGEST_KEY: Final = 256
"""Characters of a key of session state."""


class SessionState(dict[str, Any]):
    """`Connection.state`: values that JSON cannot hold are refused when they are put in, not when they are lost.

    A nested value that is changed later is checked when the state is saved.

    Args:
        secret: The session's id. Where it is a value, as FastMCP puts it in, it stays on this node (P13).
        limit: Bytes of names and values that may be saved in all (P10).
    """

    def __init__(self, *, secret: str = "", limit: float = math.inf) -> None:
        super().__init__()
        self._secret = secret
        self._limit = limit
        self._saved: dict[str, bytes] = {}
        self._version = 0

    def __setitem__(self, key: str, value: Any) -> None:
        to_json(key, value)
        super().__setitem__(key, value)

    def setdefault(self, key: str, default: Any = None, /) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> SessionState:  # type: ignore[override,misc]
        self.update(other)
        return self

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        # A copy, and a pickle of a user's own, is a plain dict: it is nobody's session state any more.
        return dict, (dict(self),)

    @property
    def is_new(self) -> bool:
        """Nothing is in it, and nothing of it was ever loaded, saved or kept."""
        return not (self or self._saved or self._version) and len(vars(self)) == _OWN_ATTRIBUTES

    def refresh(self, stored: Mapping[str, bytes], version: int = 0) -> None:
        """Takes over what another node saved since; what was changed here and is not saved yet stays.

        Args:
            version: The record's `changes`. A record older than what is here is passed over.
        """
        if version < self._version or (not stored and not self._saved):
            return
        self._version = version
        changed = self._changed_keys()
        for key in self._saved.keys() - stored.keys() - changed:
            super().pop(key, None)
            del self._saved[key]
        for key, data in stored.items():
            if data != self._saved.get(key) and key not in changed:
                super().__setitem__(key, json.loads(data))
                self._saved[key] = data

    def revert(self) -> None:
        """Forgets what was changed here and is not saved: another node has ended what changed it (P7)."""
        for key in self.keys() | self._saved.keys():
            self._restore(key)

    def _restore(self, key: str) -> None:
        if key in self._saved:
            super().__setitem__(key, json.loads(self._saved[key]))
        else:
            super().pop(key, None)

    def changes(self) -> dict[str, bytes | None]:
        """What changed since it was loaded or saved, as fields of the record to write, or to remove (None).

        Raises:
            StateNotJSON: A value that was changed in place is not JSON any more. That value is now what it was before,
                so that the next call gives the other changes, and no later request of the session fails for it.
            StateTooLarge: There would be more than the limit. Everything is now what it was before.
        """
        if not self and not self._saved:
            return {}
        found: dict[str, bytes | None] = {}
        refused: StateNotJSON | None = None
        for key in self._changed_keys():
            try:
                found[STATE + key] = to_json(key, self[key]) if key in self else None
            except StateNotJSON as error:
                refused = refused or error
                self._restore(key)
        if refused is not None:
            raise refused
        try:
            check_size({STATE + key: data for key, data in self._saved.items()}, found, self._limit)
        except StateTooLarge:
            self.revert()
            raise
        return found

    def unsaved(self, key: str) -> tuple[Any, ...] | None:
        """What this key was given here and is not saved: a value, or () if it was removed; None if neither happened."""
        if key in self:
            return (self[key],) if self._differs(key, self[key]) else None
        return () if key in self._saved else None

    def adopt(self, key: str, data: bytes | None, version: int) -> None:
        """The store has this value since this version, None for no value. What was changed here before is dropped."""
        if data is None:
            self._saved.pop(key, None)
        else:
            self._saved[key] = data
        self._version = max(self._version, version)
        self._restore(key)

    def saved(self, changes: Mapping[str, bytes | None]) -> None:
        """These changes are in the store now."""
        for name, data in changes.items():
            if data is None:
                self._saved.pop(name[len(STATE) :], None)
            else:
                self._saved[name[len(STATE) :]] = data

    def _changed_keys(self) -> set[str]:
        changed = {key for key, value in self.items() if self._differs(key, value)}
        return changed | (self._saved.keys() - self.keys())

    def _differs(self, key: str, value: Any) -> bool:
        if self._secret and type(value) is str and value == self._secret:
            return False
        try:
            return self._saved.get(key) != to_json(key, value)
        except StateNotJSON:
            return True


_OWN_ATTRIBUTES: Final = len(vars(SessionState()))


def check_size(fields: Mapping[str, bytes], changes: Mapping[str, bytes | None], limit: float) -> None:
    """Returns if a record has room for changes of session state, or state does not grow by them (P10).

    Args:
        fields: Of the record, those that hold state alone.
        changes: Of these fields: new values, with None for those that go.
        limit: Bytes of names and values, in all.

    Raises:
        StateTooLarge: There would be more than that.
    """
    before = sum(len(name) + len(data) for name, data in fields.items())
    after = before
    for name, data in changes.items():
        after -= len(name) + len(fields[name]) if name in fields else 0
        after += 0 if data is None else len(name) + len(data)
    if after > limit and after > before:
        raise StateTooLarge(
            f"a session keeps at most {limit:.0f} bytes of state (max_state_bytes), and this would make it {after}. "
            "Keep large things elsewhere, and their names here."
        )


def to_json(key: str, value: Any) -> bytes:
    """A value of session state as the record holds it.

    Raises:
        StateNotJSON: JSON cannot hold the value as it is, or the key is none.
    """
    if not isinstance(key, str) or not key.isprintable() or not key.isascii() or not 0 < len(key) <= LONGEST_KEY:
        raise StateNotJSON(f"a key of session state must be 1 to {LONGEST_KEY} printable ASCII characters")
    if (data := encoded(value)) is not None:
        return data
    raise StateNotJSON(
        f"session state {key!r} holds a {type(value).__name__} that JSON cannot hold as it is, so other nodes could "
        "not load it. Store plain JSON values; a session that has to hold this needs to stay on one node: "
        'nonstick.app(..., placement="owner").'
    )


def encoded(value: Any) -> bytes | None:
    """The value as JSON, from which the same value is read again; None where JSON cannot hold it as it is."""
    try:
        if _is_json(value):
            return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except Exception:  # noqa: S110 - what is no plain value may raise anything when it is looked at
        pass
    return None


def _is_json(value: Any) -> bool:
    if value is None or isinstance(value, str | int | float):
        return type(value) in (type(None), str, int, float, bool)
    if isinstance(value, list | tuple):
        return all(_is_json(item) for item in value)
    return isinstance(value, dict) and all(isinstance(k, str) and _is_json(v) for k, v in value.items())
