"""The session record: the few fields from which any node rebuilds a session (P2).

Field names in the store: `v` format, `protocol`, `client` (the initialize params), `principal`, `initialized`, `level`,
`unconfirmed` if it was opened with a short lifetime and is not used yet, `owner` the node that holds the session,
`sub:<hash>` one a resource subscription, `state:<key>` one a key of session state, `changed` how many changes were made
to it in steps of their own (`state.py`), `heard` where the session begins in the cluster log. A field that this version
does not know is left alone (P12).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, SupportsIndex

from mcp_types import InitializeRequestParams

from nonstick.core.events import parse_cursor
from nonstick.core.introductions import INTRODUCTIONS
from nonstick.errors import StateNotJSON, StateTooLarge, StoreUnavailable
from nonstick.store import Cursor

__all__ = [
    "CHANGED",
    "CONFIRMED",
    "LOST",
    "OWNER",
    "RELEASED",
    "STATE",
    "UNCONFIRMED",
    "Record",
    "SessionState",
    "check_state_size",
    "opening_fields",
    "parse_changed",
    "subscription_field",
    "to_json",
]

FORMAT: Final = b"1"
STATE: Final = "state:"
CHANGED: Final = "changed"
SUBSCRIPTION: Final = "sub:"
OWNER: Final = "owner"
"""The field that names the node which holds the session; there is none where any node serves it."""
RELEASED: Final = ""
"""As owner: the one that held it gave it up, for another to take."""
LOST: Final = "!"
"""As owner: the one that held it is gone, and the session with it. No node's id, for those end in a random number."""

UNCONFIRMED: Final[Mapping[str, bytes]] = {"unconfirmed": b"1"}
"""Of a session that has its first, short lifetime."""

CONFIRMED: Final[Mapping[str, None]] = dict.fromkeys(UNCONFIRMED)
"""The change that goes with the full lifetime."""


class Record(NamedTuple):
    """A loaded session record, decoded."""

    protocol_version: str
    client_params: InitializeRequestParams
    principal: bytes
    initialized: bool
    unconfirmed: bool
    log_level: str | None
    subscriptions: frozenset[str]
    state: dict[str, bytes]
    changes: int
    """How many changes of session state were made in steps of their own: tells an older record from a newer one."""
    owner: str | None
    heard_text: bytes

    @property
    def heard(self) -> Cursor:
        """What is in the cluster log after this came while the session was there."""
        return parse_cursor(self.heard_text.decode()) or Cursor(0)

    @classmethod
    def from_fields(cls, fields: Mapping[str, bytes]) -> Record:
        """Decodes what `load` returned.

        Raises:
            StoreUnavailable: It cannot be read here: it is encrypted, or of a release that changed the format (P12).
        """
        if fields.get("v") != FORMAT:
            raise StoreUnavailable(
                "the session's record is encrypted, or of another version of nonstick: this node needs the encryption "
                "keys, or the newer version, of the node that wrote it"
            )
        level, owner, client = fields.get("level"), fields.get(OWNER), fields["client"]
        subscriptions: list[str] = []
        state: dict[str, bytes] = {}
        for name, value in fields.items():
            if ":" not in name:
                continue
            if name.startswith(STATE):
                state[name[len(STATE) :]] = value
            elif name.startswith(SUBSCRIPTION):
                subscriptions.append(value.decode())
        return cls(
            protocol_version=fields["protocol"].decode(),
            client_params=INTRODUCTIONS.recent.get(client) or INTRODUCTIONS.parse(client),
            principal=fields.get("principal", b""),
            initialized="initialized" in fields,
            unconfirmed="unconfirmed" in fields,
            log_level=None if level is None else level.decode(),
            subscriptions=frozenset(subscriptions),
            state=state,
            changes=parse_changed(fields.get(CHANGED))[0],
            owner=None if owner is None else owner.decode(),
            heard_text=fields.get("heard", b""),
        )


def opening_fields(protocol_version: str, client_params: InitializeRequestParams, principal: bytes) -> dict[str, bytes]:
    """The record of a session whose `initialize` has just succeeded."""
    return {
        "v": FORMAT,
        "protocol": protocol_version.encode(),
        "client": client_params.model_dump_json(by_alias=True, exclude_unset=True).encode(),
        "principal": principal,
    }


def parse_changed(data: bytes | None) -> tuple[int, list[bytes]]:
    """How many changes of session state were made in steps of their own, and the marks of the latest ones."""
    if not data:
        return 0, []
    count, *marks = data.split()
    return int(count), marks


def subscription_field(uri: str) -> str:
    """The name of the field that keeps a subscription to this resource; its value is the URI."""
    return SUBSCRIPTION + hashlib.sha256(uri.encode()).hexdigest()[:32]


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

    def refresh(self, stored: Mapping[str, bytes], version: int = 0) -> None:
        """Takes over what another node saved since; what was changed here and is not saved yet stays.

        Args:
            version: The record's `changes`. A record that was loaded before what is here was changed is passed over.
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
        """Record fields to write, with None those to remove, for what changed since it was loaded or saved.

        Raises:
            StateNotJSON: A value that was changed in place is not JSON any more. It is now what it was before, so
                that the next call gives the other changes, and no later request of the session fails for it.
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
            check_state_size({STATE + key: data for key, data in self._saved.items()}, found, self._limit)
        except StateTooLarge:
            self.revert()
            raise
        return found

    def unsaved(self, key: str) -> tuple[Any, ...] | None:
        """What this key was given here and is not saved: a value, or nothing if it was removed; None if neither was."""
        if key in self:
            return (self[key],) if self._differs(key, self[key]) else None
        return () if key in self._saved else None

    def adopt(self, key: str, data: bytes | None, version: int) -> None:
        """The store has this value since this version, None for no value: what was changed here before is over."""
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


def check_state_size(fields: Mapping[str, bytes], changes: Mapping[str, bytes | None], limit: float) -> None:
    """Returns if the session state in these fields has room for the changes, or does not grow by them.

    Raises:
        StateTooLarge: It would be larger than `limit` bytes, names and values.
    """
    before = sum(len(name) + len(data) for name, data in fields.items() if name.startswith(STATE))
    after = before
    for name, data in changes.items():
        after -= len(name) + len(fields[name]) if name in fields else 0
        after += 0 if data is None else len(name) + len(data)
    if after > limit and after > before:
        raise StateTooLarge(
            f"a session keeps at most {limit:g} bytes of state (max_state_bytes), and this would make it {after}. Keep "
            "large things elsewhere, and their names here."
        )


def to_json(key: str, value: Any) -> bytes:
    if not isinstance(key, str) or not key.isprintable() or not key.isascii() or not 0 < len(key) <= 256:
        raise StateNotJSON("a key of session state must be 1 to 256 printable ASCII characters")
    try:
        if _is_json(value):
            return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except Exception:  # noqa: S110 - what is no plain value may raise anything when it is looked at
        pass
    raise StateNotJSON(
        f"session state {key!r} holds a {type(value).__name__} that JSON cannot hold as it is, so other nodes could "
        "not load it. Store plain JSON values; a session that has to hold this needs to stay on one node: "
        'nonstick.app(..., placement="owner").'
    )


def _is_json(value: Any) -> bool:
    if value is None or isinstance(value, str | int | float):
        return type(value) in (type(None), str, int, float, bool)
    if isinstance(value, list | tuple):
        return all(_is_json(item) for item in value)
    return isinstance(value, dict) and all(isinstance(k, str) and _is_json(v) for k, v in value.items())
