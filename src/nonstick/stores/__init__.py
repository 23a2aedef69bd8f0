"""The stores that come with nonstick, and the URLs that name them."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from nonstick.errors import ConfigurationError, close_to
from nonstick.store import Store
from nonstick.stores.common.options import grace_in, unknown_option

__all__ = ["open_store"]

_POSSIBLE: Final = (
    "memory: (one process), sqlite:///file.db or sqlite:////absolute/file.db (one machine), "
    "redis://host:port/db, rediss://host:port/db or unix:///path/to/socket (Redis or Valkey), "
    "redis+cluster://host:port,host:port or redis+sentinel://host:port,host:port/service/db (many of them), "
    "postgresql://user@host:port/database (PostgreSQL)"
)


_SCHEMES: Final = (
    "memory",
    "sqlite",
    "redis",
    "rediss",
    "unix",
    "redis+cluster",
    "rediss+cluster",
    "redis+sentinel",
    "rediss+sentinel",
    "valkey",
    "valkeys",
    "postgresql",
    "postgres",
)


_SQLITE_OPTIONS: Final = ("empty_grace",)


def open_store(store: str | Store) -> Store:
    """The store that a URL names, not yet entered; a store is passed through.

    * `memory:`: in this process only. Two calls make two stores.
    * `sqlite:///relative.db`, `sqlite:////absolute.db`: a file on a local disk. The path is taken as it stands,
      up to a `?`; `?empty_grace=15` is described at `SQLiteStore`.
    * `redis://`, `rediss://`, `unix://`: Redis or Valkey (`valkey://` and `valkeys://` are the same as the first two).
      `?prefix=name` puts the store's keys under that name; `?durability=replicated` is described at `RedisStore`.
    * `redis+cluster://host:port,host:port`, `redis+sentinel://host:port,host:port/service/db`, with `rediss+` for TLS:
      a Cluster, or the primary that Sentinels name.
    * `postgresql://`, `postgres://`: PostgreSQL. `?schema=name` puts everything under that schema; `listen_dsn`,
      `prepared`, `unlogged`, `migrate` and `pool_size` are described at `PostgresStore`.

    Connects to nothing and opens no file: entering the store does.

    Raises:
        ConfigurationError: The URL names no store, or the store needs packages that are not installed. The message
            does not repeat the URL, which may hold a password (P13).
    """
    if not isinstance(store, str):
        return store
    store = _cleaned(store)
    scheme = store.partition(":")[0].lower() if ":" in store else ""
    if scheme not in ("memory", "sqlite") and scheme in _SCHEMES and not store[len(scheme) :].startswith("://"):
        raise ConfigurationError(f"the store URL lacks a slash or two: write {scheme}://host")
    match scheme:
        case "memory":
            return _memory(store)
        case "sqlite":
            return _sqlite(store)
        case "redis" | "rediss" | "unix" | "redis+cluster" | "rediss+cluster" | "redis+sentinel" | "rediss+sentinel":
            return _redis(store)
        case "valkey" | "valkeys":
            return _redis(store.replace("valkey", "redis", 1))
        case "postgresql" | "postgres":
            return _postgres(store)
        case _:
            raise ConfigurationError(f"the store URL's scheme is not known{_hint(scheme)}; possible are {_POSSIBLE}")


def _cleaned(url: str) -> str:
    """The URL without the white space that files and environments put around it."""
    url = url.strip()
    if not url:
        raise ConfigurationError(f"the store URL is empty; possible are {_POSSIBLE}")
    if url[0] in "\"'":
        raise ConfigurationError("the store URL begins with a quotation mark: leave that out, on both sides")
    if not url.isprintable():
        raise ConfigurationError("the store URL has a line break or another control character in it")
    return url


def _hint(scheme: str) -> str:
    base = scheme.partition("+")[0]  # "postgresql+asyncpg", as SQLAlchemy has it
    meant = close_to(scheme, _SCHEMES) or (base if base in _SCHEMES else None)
    return f" (did you mean {meant}:{'' if meant == 'memory' else '//'}?)" if meant else ""


def _memory(url: str) -> Store:
    if url.lower() not in {"memory:", "memory://"}:
        raise ConfigurationError("the in-memory store is named 'memory:', with nothing after the colon")
    from nonstick.stores.memory import MemoryStore

    return MemoryStore()


def _sqlite(url: str) -> Store:
    path, _, options = url[len("sqlite:///") :].partition("?")
    if not url.lower().startswith("sqlite:///") or not path:
        raise ConfigurationError("name a file: sqlite:///relative/file.db or sqlite:////absolute/file.db")
    if path == ":memory:":
        raise ConfigurationError("an SQLite database in memory cannot be shared: use 'memory:'")
    given = dict(parse_qsl(options, keep_blank_values=True))
    for name in given:
        if name not in _SQLITE_OPTIONS:
            raise unknown_option(name, _SQLITE_OPTIONS)
    from nonstick.stores.sqlite.store import SQLiteStore

    return SQLiteStore(path, empty_grace=grace_in(given["empty_grace"])) if given else SQLiteStore(path)


def _redis(url: str) -> Store:
    url, prefix = _without_prefix(url)
    try:
        from nonstick.stores.redis.store import RedisStore
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"redis", "hiredis"}:
            raise
        raise ConfigurationError("a Redis store needs further packages: pip install 'nonstick[redis]'") from error
    return RedisStore(url) if prefix is None else RedisStore(url, prefix=prefix)


def _postgres(url: str) -> Store:
    from nonstick.stores.postgres.store import PostgresStore  # which says what to install, if its driver is missing

    return PostgresStore(url)


def _without_prefix(url: str) -> tuple[str, str | None]:
    """The URL without its `prefix` parameter, and that parameter."""
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    prefixes = [value for name, value in query if name == "prefix"]
    if not prefixes:
        return url, None
    if len(prefixes) > 1 or not prefixes[0]:
        raise ConfigurationError("give one prefix in the store URL, and not an empty one: ?prefix=name")
    rest = urlencode([(name, value) for name, value in query if name != "prefix"])
    return parts._replace(query=rest).geturl(), prefixes[0]
