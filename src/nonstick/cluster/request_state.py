"""The keys that seal `requestState`: any node opens what another one sealed."""

from __future__ import annotations

import base64
import hmac
import json
import secrets
from typing import Final

from mcp.server.request_state import AESGCMRequestStateCodec, InvalidRequestState
from mcp.shared.exceptions import MCPError
from mcp_types import INTERNAL_ERROR

from nonstick.cluster.probing import is_probe
from nonstick.errors import Undecryptable

__all__ = ["Codec", "accepting", "first_key", "pack", "sealing", "unpack"]

_KEPT_KEYS: Final = 3
"""Keys whose seals are accepted: the one that seals, and those before it."""


class Codec:
    """The SDK's own sealing, under the cluster's keys, or one of this process's own where no cluster is joined."""

    def __init__(self) -> None:
        self._keys = [first_key()]
        self._namespaces: list[str] = []
        self._keyed: AESGCMRequestStateCodec | None
        self.use(self._keys)

    def use(self, keys: list[bytes]) -> None:
        """Seals with the first of these keys and accepts all of them; with none, neither until there are some."""
        self._keys = keys
        ring = [_key_for(namespace, key) for namespace in self._namespaces or [""] for key in keys]
        self._keyed = AESGCMRequestStateCodec(ring) if ring else None

    def bind(self, namespace: str) -> None:
        """Seals for this namespace, or the first, and accepts what was sealed for it; "" for what belongs to none."""
        if namespace not in self._namespaces:
            self._namespaces.append(namespace)
            self.use(self._keys)

    def seal(self, payload: bytes) -> str:
        if is_probe(self):
            return ""
        if self._keyed is None:
            raise MCPError(INTERNAL_ERROR, "The keys for requestState are not loaded yet; try again")
        return self._keyed.seal(payload)

    def unseal(self, token: str) -> bytes:
        if self._keyed is None:
            raise InvalidRequestState("keys not loaded")
        return self._keyed.unseal(token)


def _key_for(namespace: str, key: bytes) -> bytes:
    return hmac.digest(key, f"nonstick namespace {namespace}".encode(), "sha256") if namespace else key


def first_key() -> bytes:
    """A new key of the length that the SDK's codec takes."""
    return secrets.token_bytes(32)


def accepting(keys: bytes, new: bytes) -> bytes:
    """These packed keys, and a new one for accepting only. Every node is to know it before any seals with it."""
    others = [key for key in unpack(keys) if key != new]
    return pack([*others[: _KEPT_KEYS - 1], new])


def sealing(keys: bytes, new: bytes) -> bytes:
    """These packed keys, with this one of them to seal with."""
    return pack([new, *(key for key in unpack(keys) if key != new)])


def pack(keys: list[bytes]) -> bytes:
    """These keys as the cluster's record holds them."""
    return json.dumps([base64.b64encode(key).decode() for key in keys]).encode()


def unpack(data: bytes) -> list[bytes]:
    """The keys in the cluster's record.

    Raises:
        Undecryptable: They are encrypted, or of another version.
    """
    try:
        return [base64.b64decode(key) for key in json.loads(data)]
    except ValueError:
        raise Undecryptable(
            "what the nodes share is encrypted, or of another version of nonstick: give the encryption keys of the "
            "nodes that wrote it"
        ) from None
