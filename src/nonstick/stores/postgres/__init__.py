"""PostgreSQL."""

from nonstick.stores.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
