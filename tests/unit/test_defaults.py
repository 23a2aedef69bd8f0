"""What holds where nobody says otherwise: every default of every setting, in one place, as the pages in docs/ have it.

A default that changes is a change of behaviour. It changes here and on its page, or not at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Final

import pytest
from mcp.server import Server

import nonstick
from nonstick import store
from nonstick.cluster.state_store import MAX_STATE
from nonstick.commands import cli, serve
from nonstick.commands.serve_options import ServeOptions
from nonstick.core import clipping, event_ids, jsonrpc, places
from nonstick.core.settings import Settings
from nonstick.stores.memory import MemoryStore
from nonstick.stores.postgres import PostgresStore
from nonstick.stores.postgres.url import Address as Database
from nonstick.stores.redis import RedisStore
from nonstick.stores.redis.url import Address, Deployment
from nonstick.stores.sqlite import SQLiteStore

SETTINGS: Final[dict[str, Any]] = {
    "answer": "auto",
    "window": 0.5,
    "lifetime": 1800.0,
    "retry_interval": 1000,
    "max_sessions": 10_000,
    "max_sessions_per_principal": 1000,
    "unconfirmed_lifetime": 60.0,
    "unattended_timeout": None,
    "server_request_timeout": 3600.0,
    "connection_lifetime": 86_400.0,
    "max_principal_share": 0.5,
    "max_streams": 128,
    "max_streams_per_node": 4096,
    "max_listeners": 32,
    "max_listeners_per_node": 4096,
    "max_log_events": 10_000,
    "max_log_bytes": 16_777_216,
    "max_json_depth": 64,
    "max_header_bytes": 32_768,
    "max_subscriptions": 1000,
    "max_state_bytes": 1_048_576,
    "max_state_records": 100_000,
    "max_state_records_per_principal": 1000,
    "max_initialize_bytes": 65_536,
    "send_timeout": 30.0,
    "receive_timeout": 60.0,
    "ping_interval": 15.0,
    "grace": 20.0,
    "lease": 12.0,
    "max_stall": 60.0,
    "placement": "any",
    "rehydrate": None,
    "relay_headers": (),
    "relay_query": False,
    "trace_session_ids": "hashed",
    "reexecute": "never",
    "namespace": None,
    "node_name": None,
    "node_header": False,
}
"""What a manager goes by that was told nothing."""

DOOR: Final[dict[str, Any]] = {
    "cluster": None,
    "retry_interval": None,
    "json_response": False,
    "session_idle_timeout": 1800,
    "max_request_body_size": 4_194_304,
    "max_sessions": 10_000,
}
"""Arguments that `nonstick.app` and `SessionManager` have beside the options."""

OF_APP: Final = DOOR | {
    "path": None,
    "stateless_http": False,
    "transport_security": None,
    "host": "127.0.0.1",
    "auth": None,
    "token_verifier": None,
    "auth_server_provider": None,
    "custom_starlette_routes": None,
    "debug": False,
}

OF_MANAGER: Final = DOOR | {
    "event_store": None,
    "stateless": False,
    "security_settings": None,
    "modern": None,
    "endpoint": "",
}

OF_REDIS: Final[dict[str, Any]] = {
    "prefix": "nonstick",
    "durability": None,
    "timeout": 2.0,
    "connect_timeout": 2.0,
    "max_waiting": 10_000,
    "max_bytes": 67_108_864,
    "heartbeat": 3.0,
    "empty_grace": None,
}

OF_POSTGRES: Final[dict[str, Any]] = {
    "schema": None,
    "listen_dsn": None,
    "prepared": None,
    "unlogged": None,
    "pool_size": None,
    "migrate": None,
    "empty_grace": None,
    "timeout": 2.0,
    "max_waiting": 10_000,
    "heartbeat": 3.0,
    "sweep_interval": 5.0,
}

IN_POSTGRES_URL: Final[dict[str, Any]] = {
    "schema": "nonstick",
    "listen_dsn": None,
    "unlogged": False,
    "prepared": True,
    "pool_size": 10,
    "migrate": True,
    "empty_grace": 15.0,
    "connect_timeout": None,
    "system_authorities": False,
}

IN_REDIS_URL: Final[dict[str, Any]] = {
    "host": "localhost",
    "port": 6379,
    "path": "",
    "db": 0,
    "username": "",
    "password": "",
    "tls": None,
    "tls_options": {},
}

OF_SERVE: Final[dict[str, Any]] = {
    "target": "server.py",
    "store": "sqlite:///.nonstick/sessions.db",
    "host": "127.0.0.1",
    "port": 8000,
    "path": "/mcp",
    "workers": 1,
    "reload": False,
    "answer": "auto",
    "placement": "any",
    "grace": 20.0,
    "lease": 12.0,
    "settings": {},
    "log_format": "text",
    "log_level": "info",
}

OF_PROTOCOL: Final[dict[str, Any]] = {
    "STANDALONE": 0,
    "NEW_STREAM": -1,
    "CANCEL_SECONDS": 60,
    "MAX_CANCELS": 128,
    "WRITER_SECONDS": 120,
    "MAX_READ": 1000,
    "MAX_READ_BYTES": 1_048_576,
    "MAX_CLIP": 1024,
    "EMPTY_GRACE_SECONDS": 15.0,
    "FRESH_SHARE": 0.1,
}
"""What stores of third parties are built to."""


OF_BATCH: Final[dict[str, Any]] = {
    "writer": "",
    "sequence": 0,
    "stream": 0,
    "attempt": 1,
    "take_over": False,
    "terminal": False,
    "expect": (),
    "answers": None,
    "settle": None,
    "cancel": None,
    "uncancel": None,
    "fields": {},
}


def manager(**options: Any) -> nonstick.SessionManager:
    server: Server[Any] = Server("defaults")
    return nonstick.SessionManager(server, store="memory:", **options)


def defaults(door: Callable[..., Any]) -> dict[str, Any]:
    """Of the arguments that may be left out."""
    parameters = inspect.signature(door).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def attributes(of: object, table: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(of, name) for name in table}


def test_every_setting_has_its_documented_default() -> None:
    assert attributes(manager().settings, SETTINGS) == SETTINGS
    assert {field.name for field in fields(Settings)} == SETTINGS.keys()


def test_app_and_manager_share_their_defaults() -> None:
    server: Server[Any] = Server("defaults")
    assert attributes(nonstick.app(server, store="memory:").manager.settings, SETTINGS) == SETTINGS


def test_plain_manager_hides_node_without_encrypting() -> None:
    """Its namespace is the server's name."""
    plain = manager()
    assert not isinstance(plain.store, nonstick.EncryptedStore)
    assert plain.endpoint.namespace == "defaults"
    assert (plain.stateless, plain.json_response, plain.max_request_body_size) == (False, False, 4_194_304)


def test_endless_session_lives_ten_years() -> None:
    assert manager(session_idle_timeout=None).settings.lifetime == 3650 * 86_400


@pytest.mark.parametrize(
    ("door", "table"),
    [
        (nonstick.app, OF_APP),
        (nonstick.adopt, {"cluster": None}),
        (nonstick.SessionManager, OF_MANAGER),
        (nonstick.Cluster, {"request_state_ttl": 600.0}),
        (nonstick.Cluster.connect, {"encryption_keys": None, "namespace": None}),
        (nonstick.EncryptedStore, {"deployment": None}),
        (RedisStore, OF_REDIS),
        (PostgresStore, OF_POSTGRES),
        (SQLiteStore, {"poll_interval": 0.005, "clock": None, "empty_grace": 15.0}),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_arguments_that_may_be_left_out(door: Callable[..., Any], table: dict[str, Any]) -> None:
    assert defaults(door) == table


@pytest.mark.parametrize(
    ("method", "table"),
    [
        ("create", {"limits": None}),
        ("load", {"renew": True}),
        ("update", {"expect": None, "lifetime": None}),
        ("read", {"limit": 256, "max_bytes": 1_048_576}),
        ("skim", {"limit": 256, "clip": 1024}),
        ("trim", {"streams": (), "standalone_before": 0}),
    ],
)
@pytest.mark.parametrize(
    "kind", [store.Store, MemoryStore, RedisStore, PostgresStore, SQLiteStore, nonstick.EncryptedStore]
)
def test_every_store_has_the_same_defaults(kind: Any, method: str, table: dict[str, Any]) -> None:
    assert defaults(getattr(kind, method)) == table


def test_store_url_without_options() -> None:
    assert attributes(Database.parse("postgresql://db/app"), IN_POSTGRES_URL) == IN_POSTGRES_URL
    assert attributes(Address.parse("redis://"), IN_REDIS_URL) == IN_REDIS_URL
    deployment = Deployment.parse("redis+sentinel://one/main")
    assert (deployment.durability, deployment.empty_grace, deployment.address.db) == (None, None, 0)
    assert [seed.port for seed in deployment.seeds] == [26_379]


def test_serve_without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[ServeOptions] = []

    def note(options: ServeOptions) -> int:
        taken.append(options)
        return 0

    monkeypatch.setattr(serve, "serve", note)
    monkeypatch.delenv("NONSTICK_STORE", raising=False)
    assert cli.main(["serve", "server.py"]) == 0
    assert vars(taken[0]) == OF_SERVE
    made = ServeOptions(target="server.py", store="sqlite:///.nonstick/sessions.db")
    assert vars(made) == OF_SERVE


def test_kept_words_of_clients_are_bounded() -> None:
    """Of a cancel's reason, and of progress; of a request's id in an event id; and how many places that names.

    And of what a client names at all; and bytes of a value of FastMCP's outside of sessions.
    """
    assert (jsonrpc.LONGEST_ID, jsonrpc.LONGEST_METHOD, MAX_STATE) == (1024, 256, 1_048_576)
    assert (clipping.LONGEST_TEXT, event_ids.MAX_REQUEST_ID, places.MAX_PLACES) == (1024, 128, 16)


def test_numbers_of_the_store_protocol() -> None:
    assert attributes(store, OF_PROTOCOL) == OF_PROTOCOL
    assert attributes(store.Batch([]), OF_BATCH) == OF_BATCH
