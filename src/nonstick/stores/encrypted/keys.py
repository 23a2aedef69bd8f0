"""The keys of a deployment, and what is encrypted under them.

Format of what is encrypted: four bytes of magic, four that name the key, twelve of nonce; then bytes in clear, of a
length that the reader knows, to which the ciphertext is bound; then the ciphertext with its sixteen bytes of
authentication.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from nonstick.errors import ConfigurationError, Undecryptable

__all__ = ["HEAD_BYTES", "OVERHEAD_BYTES", "PLAINTEXT", "KeyRing", "key_name_of", "keys_from"]

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

HEAD_BYTES: Final = len(_MAGIC) + _ID_BYTES + _NONCE_BYTES
"""Before the bytes in clear."""

OVERHEAD_BYTES: Final = HEAD_BYTES + _TAG_BYTES
"""What encryption adds, without the bytes in clear."""


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
        return key_name_of(data) == self._first

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
        name = key_name_of(data)
        if name is None:
            if self._reads_plaintext:
                return data
            raise Undecryptable(f"is not encrypted, and these keys do not allow for that ({PLAINTEXT!r})")
        if name not in self._keys:
            raise Undecryptable(f"is encrypted under key {name.hex()}, which this node was not given")
        body = HEAD_BYTES + clear
        cipher = self._ciphers(name, session)
        nonce, clear_text = data[HEAD_BYTES - _NONCE_BYTES : HEAD_BYTES], data[HEAD_BYTES:body]
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


def key_name_of(data: bytes) -> bytes | None:
    """The name of the key that this was encrypted under; None if it was not."""
    return data[len(_MAGIC) : len(_MAGIC) + _ID_BYTES] if data.startswith(_MAGIC) else None
