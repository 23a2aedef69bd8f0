"""The session record: the few fields from which any node rebuilds a session (P2).

Field names in the store: `v` format, `protocol`, `client` (the initialize params), `principal`, `initialized`, `level`,
`unconfirmed` if it was opened with a short lifetime and is not used yet, `owner` the node that holds the session,
`sub:<hash>` one a resource subscription, `state:<key>` one a key of session state, `changed` how many changes were made
to it in steps of their own (`session/state.py`), `heard` where the session begins in the cluster log. A field that this
version does not know is left alone (P12).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final, NamedTuple

from mcp_types import ClientCapabilities, Implementation, InitializeRequestParams
from mcp_types.version import LATEST_HANDSHAKE_VERSION

from nonstick.core.event_ids import parse_cursor
from nonstick.core.introductions import INTRODUCTIONS
from nonstick.errors import StoreUnavailable
from nonstick.store import Cursor

__all__ = [
    "CHANGED",
    "CONFIRMED",
    "LOST",
    "OWNER",
    "RELEASED",
    "STATE",
    "UNCONFIRMED",
    "UNKNOWN",
    "Record",
    "opening_fields",
    "parse_changed",
    "subscription_field",
]

FORMAT: Final = b"1"
STATE: Final = "state:"
CHANGED: Final = "changed"
SUBSCRIPTION: Final = "sub:"
OWNER: Final = "owner"
"""The field that names the node which holds the session. A session that any node serves has no such field."""
RELEASED: Final = ""
"""As owner: the node that held the session gave it up, for another one to take."""
LOST: Final = "!"
"""As owner: the node that held the session is gone, and the session with it. No node has this id, for ids end in a
random number."""

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
            StoreUnavailable: The record is encrypted, or of a release that changed the format: unreadable here (P12).
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


UNKNOWN: Final = Record(
    protocol_version=LATEST_HANDSHAKE_VERSION,
    client_params=InitializeRequestParams(
        protocol_version=LATEST_HANDSHAKE_VERSION,
        capabilities=ClientCapabilities(),
        client_info=Implementation(name="", version=""),
    ),
    principal=b"",
    initialized=False,
    unconfirmed=False,
    log_level=None,
    subscriptions=frozenset(),
    state={},
    changes=0,
    owner=None,
    heard_text=b"",
)
"""In place of a record that there is none of yet: the session is being opened."""


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
