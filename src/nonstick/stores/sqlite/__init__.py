"""SQLite: one file, for the processes of one machine."""

from nonstick.stores.sqlite.store import SQLiteStore

__all__ = ["SQLiteStore"]
