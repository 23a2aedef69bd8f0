"""Redis and Valkey: one server, a Cluster, or behind Sentinels."""

from nonstick.stores.redis.store import RedisStore

__all__ = ["RedisStore"]
