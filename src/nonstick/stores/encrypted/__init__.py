"""Encryption at rest, over any store."""

from nonstick.stores.encrypted.store import EncryptedStore

__all__ = ["EncryptedStore"]
