"""Fields and events, and their ciphertext: each is bound to where it belongs, and does not decrypt anywhere else."""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from nonstick.errors import Undecryptable
from nonstick.store import NEW_STREAM, Batch, Draft, Event
from nonstick.stores.encrypted.keys import HEAD_BYTES, OVERHEAD_BYTES, KeyRing, key_name_of

__all__ = ["Sealer"]

logger = logging.getLogger("nonstick.stores.encrypted")

_MOST_TOLD: Final = 100
"""Keys that a node logs the lack of."""

_PLACE: Final = struct.Struct(">B8sQI")
_OPENS: Final = 1
_HAS_WRITER: Final = 2
_EVENT_OVERHEAD: Final = OVERHEAD_BYTES + _PLACE.size


class EventPlace(NamedTuple):
    """Where an event stood in what its writer wrote. Kept in clear beside the ciphertext, which is bound to it."""

    flags: int
    writer: bytes
    sequence: int
    offset: int

    @classmethod
    def of(cls, batch: Batch, index: int) -> EventPlace:
        """Of the event with this index in the batch."""
        flags = (_OPENS if batch.stream == NEW_STREAM else 0) | (_HAS_WRITER if batch.writer else 0)
        writer = hashlib.blake2b(batch.writer.encode(), digest_size=8).digest()
        return cls(flags, writer, batch.sequence if batch.writer else 0, index)


class Sealer:
    """Encrypts with the first key of a ring, and decrypts with all of them.

    Attributes:
        told: Names of keys that were said to be missing, or not to fit.
    """

    def __init__(self, ring: KeyRing) -> None:
        self.ring = ring
        self.told: set[str] = set()

    def clear_size(self, size: int, count: int) -> int:
        """Bytes that so many events have, of what they have as ciphertext.

        Exact, but for events that were written before encryption was turned on.
        """
        return max(0, size - count * _EVENT_OVERHEAD) if self.ring.encrypts else size

    # ---- fields

    def seal_field(self, key: str, name: str, value: bytes) -> bytes:
        """The ciphertext of one field of the session `key`."""
        return self.ring.seal(key, b"field " + name.encode(), value, comparable=True)

    def seal_changes(self, key: str, changes: Mapping[str, bytes | None]) -> dict[str, bytes | None]:
        """The ciphertext of each of these fields. None, for a field that is not there, stays None."""
        return {n: None if value is None else self.seal_field(key, n, value) for n, value in changes.items()}

    def open_field(self, key: str, name: str, data: bytes) -> bytes:
        """The value of a field.

        Raises:
            Undecryptable: The key is missing, or the data are another field's or were changed.
        """
        try:
            return self.ring.open(key, b"field " + name.encode(), 0, data)
        except Undecryptable as error:
            # Not the whole name: a key of session state may be somebody's.
            raise self._explained(f"session {key[:12]}: field {name.partition(':')[0]!r}", error, data) from None

    def open_if_any(self, key: str, name: str, data: bytes | None) -> bytes | None:
        """As `open_field`; None for a field that is not there."""
        return None if data is None else self.open_field(key, name, data)

    # ---- events

    def seal_events(self, key: str, batch: Batch) -> list[Draft]:
        """The ciphertext of the batch's events."""
        return [self._seal_event(key, batch, index, draft) for index, draft in enumerate(batch.events)]

    def open_events(self, key: str, events: Sequence[Event]) -> list[Event]:
        """Decrypts a slice of a log, whose events must stand in the order in which each writer wrote them.

        Raises:
            Undecryptable: The key is missing, or an event was changed, or does not stand where it was written.
        """
        last: dict[bytes, tuple[int, int]] = {}
        opened: list[Event] = []
        for event in events:
            try:
                place, data = self._open_event(key, event)
                if place is not None and place.flags & _HAS_WRITER:
                    this = (place.sequence, place.offset)
                    if this <= last.get(place.writer, (-1, -1)):
                        raise Undecryptable("does not stand where its writer wrote it")
                    last[place.writer] = this
            except Undecryptable as error:
                raise self._explained(f"session {key[:12]}: event {event.position}", error, event.data) from None
            opened.append(event._replace(data=data))
        return opened

    def _seal_event(self, key: str, batch: Batch, index: int, draft: Draft) -> Draft:
        stream = None if batch.stream == NEW_STREAM else batch.stream
        clear = _PLACE.pack(*EventPlace.of(batch, index))
        return Draft(draft.tag, self.ring.seal(key, _bound_to(stream, draft.tag), draft.data, clear=clear))

    def _open_event(self, key: str, event: Event) -> tuple[EventPlace | None, bytes]:
        place: EventPlace | None = None
        stream: int | None = event.stream
        if key_name_of(event.data) is not None:
            if len(event.data) < _EVENT_OVERHEAD:
                raise Undecryptable("is cut short")
            place = EventPlace(*_PLACE.unpack_from(event.data, HEAD_BYTES))
            if place.flags & _OPENS:
                # The stream's name was not known when it was written, but follows from where it stands.
                if event.stream != event.position - place.offset:
                    raise Undecryptable("does not stand where its stream was opened")
                stream = None
        return place, self.ring.open(key, _bound_to(stream, event.tag), _PLACE.size, event.data)

    def _explained(self, what: str, error: Undecryptable, data: bytes) -> Undecryptable:
        """The error, with what it is about. Also logged, once for each key: an operator has to know."""
        explained = Undecryptable(f"{what} {error}")
        name = (key_name_of(data) or b"").hex()
        # An attacker who can write to the store can make up any number of keys.
        if name not in self.told and len(self.told) < _MOST_TOLD:
            self.told.add(name)
            logger.error("%s; this node has %s", explained, ", ".join(self.ring.names) or "no key")
        return explained


def _bound_to(stream: int | None, tag: bytes) -> bytes:
    """What an event's ciphertext is bound to, beside its `EventPlace`. None: the stream that it opens."""
    return b"event %s %s" % (b"new" if stream is None else b"%d" % stream, tag)
