"""The URLs that name a store."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nonstick.errors import ConfigurationError
from nonstick.stores import open_store
from nonstick.stores.memory import MemoryStore
from nonstick.stores.postgres import PostgresStore
from nonstick.stores.redis import RedisStore
from nonstick.stores.sqlite import SQLiteStore
from nonstick.testing import ValkeyServer

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("url", ["memory:", "memory://", "MEMORY:"])
def test_two_memory_urls_make_two_stores(url: str) -> None:
    """`open_store`: in this process only; two calls make two stores."""
    first, second = open_store(url), open_store(url)
    assert isinstance(first, MemoryStore)
    assert first is not second


def test_store_is_passed_through() -> None:
    """`open_store`: an instance is used as it is."""
    store = MemoryStore()
    assert open_store(store) is store


async def test_sqlite_url_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`open_store`: three slashes for a relative path, four for an absolute one."""
    monkeypatch.chdir(tmp_path)
    for url, path in (("sqlite:///relative.db", "relative.db"), (f"sqlite:///{tmp_path}/absolute.db", "absolute.db")):
        store = open_store(url)
        assert isinstance(store, SQLiteStore)
        assert not (tmp_path / path).exists()
        async with store:
            await store.create("key", {}, lifetime=60)
        assert (tmp_path / path).exists()


@pytest.mark.parametrize("name", ["redis", "rediss", "valkey", "valkeys"])
def test_redis_url_makes_a_redis_store(name: str) -> None:
    """`open_store`: Redis or Valkey, without connecting yet."""
    store = open_store(f"\n{name}://cache.example:6379/2\n")
    assert isinstance(store, RedisStore)
    assert store.url == f"{'rediss' if name in ('rediss', 'valkeys') else 'redis'}://cache.example:6379/2"


def test_unix_url_makes_a_redis_store() -> None:
    """`open_store`: a server on a Unix socket."""
    assert isinstance(open_store("unix:///run/valkey.sock"), RedisStore)


async def test_prefixes_in_urls_separate_applications(valkey: ValkeyServer) -> None:
    """`open_store`: `?prefix=name` puts the store's keys under that name, and is not sent to the server."""
    one, same, other = (f"{valkey.url}/0?prefix={name}" for name in ("one", "one", "other"))
    async with open_store(one) as a, open_store(same) as b, open_store(other) as c:
        await a.create("key", {"x": b"1"}, lifetime=60)
        assert (await b.load("key")).fields == {"x": b"1"}
        await c.create("key", {}, lifetime=60)
        assert "prefix" not in a.url


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("mysql://secret@host/db", "redis://"),
        ("cache:6379", "redis://"),
        ("sessions.db", "sqlite:///"),
        ("", "memory:"),
        (" \n", "is empty"),
        ("'redis://secret@host'", "leave that out"),
        ("redis://secret@host/\x000", "control character"),
        ("postgresql+asyncpg://secret@host/db", "did you mean postgresql://?"),
        ("postgress://secret@host/db", "did you mean postgres"),
        ("rediss+clutser://secret@host", "did you mean rediss+cluster://?"),
        ("redis:/secret", "write redis://host"),
        ("redis:secret:6379", "write redis://host"),
        ("postgresql:/secret", "write postgresql://host"),
        ("redis+cluster:/secret", "write redis+cluster://host"),
        ("sqlite:", "sqlite:///"),
        ("sqlite://", "sqlite:///"),
        ("sqlite:///", "sqlite:///"),
        ("sqlite://secret.db", "sqlite:///"),
        ("sqlite:///:memory:", "memory:"),
        ("memory://secret", "memory:"),
        ("redis://secret@host/0?prefix=", "prefix"),
        ("redis://secret@host/0?prefix=a&prefix=b", "prefix"),
    ],
)
def test_url_without_store_lists_possible_ones(url: str, hint: str) -> None:
    """ConfigurationError: the message names what to change, and does not repeat the URL (P13)."""
    with pytest.raises(ConfigurationError) as error:
        open_store(url)
    assert hint in str(error.value)
    assert "secret" not in str(error.value)


def test_redis_names_its_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """ConfigurationError: the store needs packages that are not installed."""
    import nonstick.stores

    monkeypatch.delattr(nonstick.stores, "redis")
    for name in [name for name in sys.modules if name.startswith("nonstick.stores.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hiredis", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'nonstick\[redis\]'"):
        open_store("redis://cache:6379")


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_impossible_empty_grace_is_refused(seconds: float, tmp_path: Path) -> None:
    """P15: by every store that has one."""
    with pytest.raises(ConfigurationError, match="empty_grace must be a number of seconds"):
        SQLiteStore(tmp_path / "x.db", empty_grace=seconds)
    with pytest.raises(ConfigurationError, match="empty_grace must be a number of seconds"):
        RedisStore("redis://localhost", empty_grace=seconds)
    with pytest.raises(ConfigurationError, match="empty_grace must be a number of seconds"):
        PostgresStore("postgresql://localhost/x", empty_grace=seconds)


def test_sqlite_url_takes_its_option_only(tmp_path: Path) -> None:
    """What follows a question mark is never taken for a part of the file's name."""
    store = open_store(f"sqlite:///{tmp_path}/x.db?empty_grace=2.5")
    assert store.url == f"sqlite:///{tmp_path}/x.db"
    for wrong, said in (
        ("empty_grac=1", "Did you mean empty_grace"),
        ("mode=ro", "that is not known"),
        ("empty_grace=", "a number of seconds"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            open_store(f"sqlite:///{tmp_path}/x.db?{wrong}")
    with pytest.raises(ConfigurationError, match="name a file"):
        open_store("sqlite:///?empty_grace=1")
