"""Encryption at rest: a wrapper over any store, so that what the store keeps tells nothing of what was said (P13).

Encrypted are the values of record fields and the bytes of events, each with AES-256-GCM under a key that is derived
for its session. A value is bound to where it belongs, and does not decrypt anywhere else: a field's to the deployment,
the session and its name; an event's to the deployment, the session, its stream, its tag, and its writer, sequence and
index in its batch. Positions, tags, stream and field names, ids in the pending set and times stay as they are: the
store works with them.

Format: four bytes of magic, four that name the key, twelve of nonce; for an event then its `_Place`; then the
ciphertext with its sixteen bytes of authentication.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import secrets
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import lru_cache
from types import TracebackType
from typing import Final, NamedTuple, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from nonstick.errors import ConfigurationError, StoreError, Undecryptable
from nonstick.store import (
    MAX_CLIP,
    MAX_READ_BYTES,
    NEW_STREAM,
    Appended,
    Batch,
    Cursor,
    Draft,
    Event,
    Lease,
    Loaded,
    Skimmed,
    Store,
    Wake,
)
from nonstick.stores.common.bounds import check_bounds

__all__ = ["PLAINTEXT", "EncryptedStore", "KeyRing", "keys_from"]

logger = logging.getLogger(__name__)

PLAINTEXT: Final = "plaintext"
"""In a key ring, the key that is none: first in it, what is written stays as it is; elsewhere in it, what was written
without encryption is still read."""

VARIABLE: Final = "NONSTICK_ENCRYPTION_KEYS"

_MAGIC: Final = b"\x00NE1"
"""Nothing that nonstick writes begins so: an event begins with a digit, a field is text or JSON."""

_KEY_BYTES: Final = 32
_ID_BYTES: Final = 4
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_HEAD: Final = len(_MAGIC) + _ID_BYTES + _NONCE_BYTES

_MOST_TOLD: Final = 100
"""Keys that a node logs the lack of."""

_PLACE: Final = struct.Struct(">B8sQI")
_OPENS: Final = 1
_HAS_WRITER: Final = 2
_EVENT_OVERHEAD: Final = _HEAD + _PLACE.size + _TAG_BYTES


class _Place(NamedTuple):
    """Where an event stood in what its writer wrote. Kept in clear beside the ciphertext, which is bound to it."""

    flags: int
    writer: bytes
    sequence: int
    offset: int

    @classmethod
    def of(cls, batch: Batch, index: int) -> _Place:
        flags = (_OPENS if batch.stream == NEW_STREAM else 0) | (_HAS_WRITER if batch.writer else 0)
        writer = hashlib.blake2b(batch.writer.encode(), digest_size=8).digest()
        return cls(flags, writer, batch.sequence if batch.writer else 0, index)


class KeyRing:
    """The keys of a deployment: the first one encrypts, all of them decrypt.

    Args:
        keys: Each 32 random bytes, or their base64 (either alphabet), or `PLAINTEXT`.
        deployment: What everything is bound to besides: what was written under another name does not decrypt.

    Raises:
        ConfigurationError: There is no key, or one that cannot be. The message shows none (P13).
    """

    def __init__(self, keys: Iterable[str | bytes], *, deployment: str = "") -> None:
        self._deployment = deployment.encode()
        self._keys: dict[bytes, bytes] = {}
        self._first: bytes | None = None
        self._reads_plaintext = False
        if isinstance(keys, str | bytes):
            raise ConfigurationError("give a list of encryption keys, even of one")
        for number, key in enumerate(keys):
            if key == PLAINTEXT:
                self._reads_plaintext = True
                continue
            secret = _decode(key, number + 1)
            name = _name(secret)
            self._keys[name] = secret
            if number == 0:
                self._first = name
        if not self._keys and not self._reads_plaintext:
            raise ConfigurationError("give at least one encryption key")
        # One for each ring, and gone with it: what it keeps opens sessions.
        self._ciphers: Callable[[bytes, str], _Cipher] = lru_cache(maxsize=1024)(self._cipher)

    @property
    def names(self) -> list[str]:
        """The keys' names as messages and logs show them: a part of their hash."""
        return [name.hex() for name in self._keys]

    @property
    def encrypts(self) -> bool:
        return self._first is not None

    def is_current(self, data: bytes) -> bool:
        """Whether this is what `seal` makes now, with the first key."""
        return _key_of(data) == self._first

    @property
    def is_single(self) -> bool:
        """Whether all that can be read was encrypted under one key, so that equal fields are equal ciphertexts."""
        return len(self._keys) + self._reads_plaintext == 1

    def seal(self, session: str, place: bytes, data: bytes, *, clear: bytes = b"", comparable: bool = False) -> bytes:
        """Encrypts for this place of this session; `clear` goes before the ciphertext, and cannot be changed either.

        What is `comparable` is the same ciphertext each time, at the same place of the same session under one key.
        """
        if self._first is None:
            return data
        cipher = self._ciphers(self._first, session)
        placed = _framed(place)
        nonce = cipher.nonce(placed + data) if comparable else secrets.token_bytes(_NONCE_BYTES)
        ciphertext = cipher.aead.encrypt(nonce, data, cipher.bound + placed + clear)
        return b"".join((_MAGIC, self._first, nonce, clear, ciphertext))

    def open(self, session: str, place: bytes, clear: int, data: bytes) -> bytes:
        """Decrypts what stands at this place, where `clear` bytes are before the ciphertext.

        Raises:
            Undecryptable: The key is not in this ring, or the data are not what was written there.
        """
        name = _key_of(data)
        if name is None:
            if self._reads_plaintext:
                return data
            raise Undecryptable(f"is not encrypted, and these keys do not allow for that ({PLAINTEXT!r})")
        if name not in self._keys:
            raise Undecryptable(f"is encrypted under key {name.hex()}, which this node was not given")
        body = _HEAD + clear
        cipher = self._ciphers(name, session)
        nonce, clear_text = data[_HEAD - _NONCE_BYTES : _HEAD], data[_HEAD:body]
        try:
            return cipher.aead.decrypt(nonce, data[body:], cipher.bound + _framed(place) + clear_text)
        except (InvalidTag, ValueError):  # ValueError: too short for a nonce
            raise Undecryptable(
                f"does not decrypt under key {name.hex()}: it was changed, or was written for another place"
            ) from None

    def _cipher(self, name: bytes, session: str) -> _Cipher:
        return _Cipher(self._keys[name], _framed(self._deployment) + _framed(session.encode()))


class _Cipher:
    """The keys of one session, derived from one of the deployment's.

    With one key for all sessions, random nonces would run out after some 4 thousand million values.

    Attributes:
        bound: What everything is bound to besides its place.
    """

    def __init__(self, key: bytes, bound: bytes) -> None:
        self.bound = bound
        self.aead = AESGCM(_derived(key, b"nonstick values" + bound))
        self._nonces = _derived(key, b"nonstick nonces" + bound)

    def nonce(self, what: bytes) -> bytes:
        """One that only the same place and value have."""
        return hmac.digest(self._nonces, what, "sha256")[:_NONCE_BYTES]


def _derived(key: bytes, purpose: bytes) -> bytes:
    return HKDFExpand(SHA256(), _KEY_BYTES, purpose).derive(key)


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(4) + part


def keys_from(environ: Mapping[str, str]) -> list[str] | None:
    """The keys in `NONSTICK_ENCRYPTION_KEYS`, with commas or white space between them; None where it is not set.

    Raises:
        ConfigurationError: There is none in it (a secret that was not filled in must not mean "no encryption"), or one
            that cannot be.
    """
    text = environ.get(VARIABLE)
    if text is None:
        return None
    keys = text.replace(",", " ").split()
    try:
        KeyRing(keys)
    except ConfigurationError as error:
        raise ConfigurationError(f"{VARIABLE}: {error}") from None
    return keys


def _decode(key: str | bytes, number: int) -> bytes:
    if isinstance(key, bytes) and len(key) == _KEY_BYTES:
        return key
    text = key.encode() if isinstance(key, str) else key
    try:
        secret = base64.b64decode(text.strip().rstrip(b"=").translate(_STANDARD_ALPHABET) + b"=", validate=True)
    except binascii.Error:
        secret = b""
    if len(secret) != _KEY_BYTES:
        raise ConfigurationError(
            f"encryption key {number} is not 32 bytes in base64. Make one with: openssl rand -base64 32"
        )
    return secret


_STANDARD_ALPHABET: Final = bytes.maketrans(b"-_", b"+/")


def _name(secret: bytes) -> bytes:
    return hashlib.blake2b(secret, digest_size=_ID_BYTES, person=b"nonstick-key-id").digest()


def _key_of(data: bytes) -> bytes | None:
    """The name of the key that this was encrypted under; None if it was not."""
    return data[len(_MAGIC) : len(_MAGIC) + _ID_BYTES] if data.startswith(_MAGIC) else None


class EncryptedStore:
    """A store that keeps only ciphertext in another one. Has its promises, all of them.

        app = nonstick.app(mcp, store=EncryptedStore(open_store("redis://cache:6379"), keys))

    What cannot be decrypted raises `Undecryptable`, which is a `StoreUnavailable`: clients get 503, and nothing is
    passed over (P9).

    Args:
        store: Where the ciphertext goes.
        keys: The first one encrypts, all of them decrypt. Each 32 random bytes, or their base64, or `PLAINTEXT`.
        deployment: What everything is bound to besides its session; by default the store's prefix or schema, if it
            has one.

    Raises:
        ConfigurationError: There is no key, or one that cannot be.
    """

    def __init__(self, store: Store, keys: Iterable[str | bytes], *, deployment: str | None = None) -> None:
        self.store = store
        self._deployment = getattr(store, "namespace", "") if deployment is None else deployment
        self._stack = AsyncExitStack()
        self._told: set[str] = set()
        self.use(keys)

    def use(self, keys: Iterable[str | bytes]) -> None:
        """Works with these keys from now on. May be called while calls are under way.

        Add a new key at the end on every node first, then make it the first one.
        """
        self._ring = KeyRing(keys, deployment=self._deployment)
        self._told.clear()

    @property
    def key_names(self) -> list[str]:
        """The keys as logs name them, the first one first."""
        return self._ring.names

    @property
    def encrypts(self) -> bool:
        """Whether what is written is encrypted."""
        return self._ring.encrypts

    @property
    def url(self) -> str:
        return self.store.url

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.store)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self._stack.aclose()

    # ---- the record

    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        sealed = {name: self._seal_field(key, name, value) for name, value in fields.items()}
        await self.store.create(key, sealed, lifetime=lifetime, limits=limits)

    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        loaded = await self.store.load(key, renew=renew)
        fields = {name: self._open_field(key, name, data) for name, data in loaded.fields.items()}
        stale = {name: data for name, data in loaded.fields.items() if not self._ring.is_current(data)}
        if stale:
            await self._renew(key, stale, fields)
        return loaded._replace(fields=fields, size=self._clear_size(loaded.size, loaded.count))

    async def update(
        self,
        key: str,
        changes: Mapping[str, bytes | None],
        *,
        expect: Mapping[str, bytes | None] | None = None,
        lifetime: float | None = None,
    ) -> bool:
        sealed = self._seal_changes(key, changes)
        if not expect:
            return await self.store.update(key, sealed, lifetime=lifetime)
        if self._ring.is_single:
            return await self.store.update(key, sealed, expect=self._seal_changes(key, expect), lifetime=lifetime)
        # While keys change, a value may be stored in one of several ciphertexts. The store compares with the one that
        # held the value a moment ago: if that is still there, so is the value, and this is one step.
        while True:
            stored = (await self.store.load(key, renew=False)).fields
            found = {name: stored.get(name) for name in expect}
            if any(self._open_if_any(key, name, data) != expect[name] for name, data in found.items()):
                return False
            if await self.store.update(key, sealed, expect=found, lifetime=lifetime):
                return True

    async def touch(self, keys: Collection[str]) -> None:
        await self.store.touch(keys)

    async def delete(self, key: str) -> bool:
        return await self.store.delete(key)

    async def _renew(self, key: str, stale: Mapping[str, bytes], fields: Mapping[str, bytes]) -> None:
        """Writes these fields again under the first key: so older keys come out of use, also for sessions that last."""
        try:
            again = {name: self._seal_field(key, name, fields[name]) for name in stale}
            await self.store.update(key, again, expect=stale)
        except StoreError:
            pass  # the next load tries again

    # ---- the log

    async def append(self, key: str, batch: Batch) -> Appended:
        events = [self._seal_event(key, batch, index, draft) for index, draft in enumerate(batch.events)]
        fields = self._seal_changes(key, batch.fields)
        appended = await self.store.append(key, replace(batch, events=events, fields=fields))
        return appended._replace(size=self._clear_size(appended.size, appended.count))

    def _clear_size(self, size: int, count: int) -> int:
        """Bytes that so many events have, of what they have as ciphertext.

        Exact, but for events that were written before encryption was turned on.
        """
        return max(0, size - count * _EVENT_OVERHEAD) if self._ring.encrypts else size

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        return self._open_events(key, await self.store.read(key, after, limit=limit, max_bytes=max_bytes))

    async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
        # What is cut off cannot be authenticated: each event has to be read whole.
        check_bounds(limit=limit, clip=clip)
        events = await self.read(key, after, limit=limit)
        return [Skimmed(event._replace(data=event.data[:clip]), len(event.data)) for event in events]

    async def trim(self, key: str, *, streams: Collection[int] = (), standalone_before: int = 0) -> None:
        await self.store.trim(key, streams=streams, standalone_before=standalone_before)

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        # An event is bound to its stream and its tag, but not to its place in the log, which its writer did not know:
        # said again one place later, it would decrypt. So nothing is taken that does not come from a read (P14).
        return self.store.watch(key, lambda _: wake(None))

    # ---- nodes and the store itself

    def lease(self, node: str) -> Lease:
        return self.store.lease(node)

    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        return await self.store.lapsed(nodes)

    async def ping(self) -> None:
        await self.store.ping()

    # ---- sealing and opening

    def _seal_field(self, key: str, name: str, value: bytes) -> bytes:
        return self._ring.seal(key, b"field " + name.encode(), value, comparable=True)

    def _seal_changes(self, key: str, changes: Mapping[str, bytes | None]) -> dict[str, bytes | None]:
        return {n: None if value is None else self._seal_field(key, n, value) for n, value in changes.items()}

    def _open_field(self, key: str, name: str, data: bytes) -> bytes:
        try:
            return self._ring.open(key, b"field " + name.encode(), 0, data)
        except Undecryptable as error:
            # Not the whole name: a key of session state may be somebody's.
            raise self._explained(f"session {key[:12]}: field {name.partition(':')[0]!r}", error, data) from None

    def _open_if_any(self, key: str, name: str, data: bytes | None) -> bytes | None:
        return None if data is None else self._open_field(key, name, data)

    def _seal_event(self, key: str, batch: Batch, index: int, draft: Draft) -> Draft:
        stream = None if batch.stream == NEW_STREAM else batch.stream
        clear = _PLACE.pack(*_Place.of(batch, index))
        return Draft(draft.tag, self._ring.seal(key, _event_place(stream, draft.tag), draft.data, clear=clear))

    def _open_events(self, key: str, events: Sequence[Event]) -> list[Event]:
        """Decrypts a slice of a log, whose events must stand in the order in which each writer wrote them."""
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

    def _open_event(self, key: str, event: Event) -> tuple[_Place | None, bytes]:
        place: _Place | None = None
        stream: int | None = event.stream
        if _key_of(event.data) is not None:
            if len(event.data) < _EVENT_OVERHEAD:
                raise Undecryptable("is cut short")
            place = _Place(*_PLACE.unpack_from(event.data, _HEAD))
            if place.flags & _OPENS:
                # The stream's name was not known when it was written, but follows from where it stands.
                if event.stream != event.position - place.offset:
                    raise Undecryptable("does not stand where its stream was opened")
                stream = None
        return place, self._ring.open(key, _event_place(stream, event.tag), _PLACE.size, event.data)

    def _explained(self, what: str, error: Undecryptable, data: bytes) -> Undecryptable:
        """The error, with what it is about; logged, once for each key: an operator has to know, whoever asked."""
        explained = Undecryptable(f"{what} {error}")
        name = (_key_of(data) or b"").hex()
        # Whoever writes to the store can make up any number of keys.
        if name not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(name)
            logger.error("%s; this node has %s", explained, ", ".join(self._ring.names) or "no key")
        return explained


def _event_place(stream: int | None, tag: bytes) -> bytes:
    return b"event %s %s" % (b"new" if stream is None else b"%d" % stream, tag)
