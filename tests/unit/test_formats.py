"""The exact bytes that other nodes, other releases and clients hold: none of them may change (P12).

A name that is derived in another way finds nothing of what was written before it: no session, no place in a stream, no
value. So each is written down here as it was, and not derived again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import pytest
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp_types import InitializeRequestParams

import nonstick
from nonstick.cluster.state_store import Allowance, StateStore
from nonstick.core.event_ids import EventId, parse_event_id
from nonstick.core.events import Kind, body_of, draft
from nonstick.core.jsonrpc import request_key
from nonstick.core.names import identity, is_session_of, session_key
from nonstick.core.principals import principal_group, principal_of
from nonstick.core.record import opening_fields, parse_changed, subscription_field
from nonstick.log.guard import GuardedStore
from nonstick.store import NEW_STREAM, Appended, Batch, Cursor, Draft
from nonstick.stores.memory import MemoryStore

pytestmark = pytest.mark.anyio

SESSION: Final = "0123456789abcdef0123456789abcdef01234567"
PLACE: Final = Cursor(300, b"\x00\x01tagtag")

KINDS: Final = {
    "OPENED": "o",
    "MESSAGE": "m",
    "TERMINAL": "t",
    "TAKEN": "a",
    "PROBE": "q",
    "ALIVE": "v",
    "HANGUP": "h",
    "REPLY": "r",
    "PROGRESS": "p",
    "CANCEL": "c",
    "LISTENING": "l",
    "PUBLISHED": "b",
    "KEYS": "k",
    "ASKING": "w",
    "CARRYING": "y",
    "LEFT": "x",
    "OWNER": "n",
    "NOTICE": "i",
    "CHANGED": "d",
}

EVENT_IDS: Final = {
    "1.7.12c.0001746167746167.InJlcXVlc3QtMSI.": EventId(7, PLACE, "request-1"),
    "1.7.12c.0001746167746167.Nw.": EventId(7, PLACE, 7),
    "1.7.12c.0001746167746167..": EventId(7, PLACE),
    "1.0.12c.0001746167746167..": EventId(0, PLACE),
    "1.0.12c.0001746167746167.IjUuMzEzMjMzMzQzNTM2MzczOCF0b2xkfkFBRkJRa01CRjJGaVl3Ig.": EventId(
        0, PLACE, None, Cursor(5, b"12345678"), "told", (Cursor(20, b"abcdefgh"), Cursor(299, b"ABCDEFGH"))
    ),
}
"""Without the hash that ends them."""


class Written(MemoryStore):
    """Keeps what it was asked to write."""

    def __init__(self) -> None:
        super().__init__()
        self.created: list[tuple[str, dict[str, bytes], float, dict[str, int]]] = []
        self.updated: list[tuple[str, dict[str, bytes | None]]] = []
        self.appended: list[tuple[str, bytes]] = []

    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        self.created.append((key, dict(fields), lifetime, dict(limits or {})))
        await super().create(key, fields, lifetime=lifetime, limits=limits)

    async def update(self, key: str, changes: Mapping[str, bytes | None], **more: Any) -> bool:
        self.updated.append((key, dict(changes)))
        return await super().update(key, changes, **more)

    async def append(self, key: str, batch: Batch) -> Appended:
        self.appended += [(key, event.data) for event in batch.events]
        return await super().append(key, batch)


# ---- names


def test_session_id_names_its_stored_session() -> None:
    assert session_key(SESSION) == "deb87fabd17715bb31ad4cf4ffb9494eeb15f8d3"


def test_session_id_is_bound_to_server() -> None:
    shop = identity("shop", "/mcp")
    assert shop == "cca351bde1981ac90d4f06ed7c75ee4c"
    assert is_session_of(shop, "a" * 32 + "WyIVkvrC")


def test_principal_and_group_have_one_form() -> None:
    token = AccessToken(token="t", client_id="c", scopes=[], subject="ada", claims={"iss": "one"})
    principal = principal_of({"user": AuthenticatedUser(token)})
    assert principal == b'{"client_id": "c", "issuer": "one", "subject": "ada"}'
    assert principal_group(principal) == "principal:0865fc77f5c9fdca6dabbad2286ad81c"


def test_request_name_holds_id_or_hash() -> None:
    """By the hash where the id is a long one."""
    assert [request_key(name) for name in (7, "7", -7, "x" * 64)] == ["7", "7", "-7", "x" * 64]
    assert request_key("x" * 65) == "9537c5fdf120482f7d58d25e9ed583f52c02b4e304ea814db1633ad565aed7e9"


# ---- the log


def test_every_event_kind_keeps_its_byte() -> None:
    assert {kind.name: chr(kind) for kind in Kind} == KINDS
    assert draft(Kind.OPENED, b"{}").data == b"1o{}"
    assert body_of(b"1o{}") == b"{}"


@pytest.mark.parametrize(("text", "place"), EVENT_IDS.items(), ids=range(len(EVENT_IDS)))
def test_event_id_has_one_form(text: str, place: EventId) -> None:
    """Clients come back with those that the last release gave them."""
    sealed = place.seal(SESSION)
    assert sealed[:-16] == text
    read = parse_event_id(sealed, SESSION)
    assert read is not None
    assert read._replace(before=place.before) == place


def test_event_id_ends_in_sessions_hash() -> None:
    assert EventId(7, Cursor(9, PLACE.tag), "request-1").seal(SESSION).rpartition(".")[2] == "27a64ff1171ce664"


# ---- the record


def test_new_sessions_record_has_four_fields() -> None:
    said = {
        "protocolVersion": "2025-11-25",
        "capabilities": {"sampling": {}},
        "clientInfo": {"name": "ü", "version": "1"},
    }
    fields = opening_fields("2025-11-25", InitializeRequestParams.model_validate(said, by_name=False), b"ada")
    assert json.loads(fields.pop("client")) == said
    assert fields == {"v": b"1", "protocol": b"2025-11-25", "principal": b"ada"}
    assert subscription_field("memo://a") == "sub:f09c21e69f4eac55dd04668a5b5c6b5c"
    assert parse_changed(b"12 aa bb") == (12, [b"aa", b"bb"])


# ---- the cluster


async def test_cluster_log_says_change_and_server() -> None:
    store = Written()
    async with nonstick.Cluster.connect(store, namespace="shop") as cluster:
        await cluster.notify_tools_changed()
        await cluster.notify_resource_updated("memo://a")
    assert store.created == [("cluster", {}, 30 * 86_400.0, {})]
    whose = b'"servers":["a7374cb33201cd4e355d071b49715e1c"]'
    assert store.appended == [
        ("cluster", b'1b{"method":"notifications/tools/list_changed","uri":null,' + whose + b"}"),
        ("cluster", b'1b{"method":"notifications/resources/updated","uri":"memo://a",' + whose + b"}"),
    ]
    [(_, keys)] = store.updated
    packed = keys.pop("request-state-keys")
    assert packed is not None
    assert keys == {}
    assert [len(key) for key in json.loads(packed)] == [44]  # 32 bytes in base64


async def test_fastmcp_value_has_its_own_record() -> None:
    store, state = Written(), StateStore()
    state.use(GuardedStore(store), Allowance(), ["shop"])
    await state.put("user:ada", {"value": 1}, collection="carts")
    field = "kv:36b812dde008d3e29c964231edec3b50"
    expected = {field: b'{"value":{"value":1}}', "lifetime": b"2592000.0"}
    assert store.created == [("kv:c96d6f137c1fe62d86f5bb7680e88f04", expected, 30 * 86_400.0, {"state": 100_000})]
    await state.put("user:ada", {"value": 2}, collection="carts", ttl=7)
    [(_, changes)] = store.updated
    packed = changes[field]
    assert packed is not None
    assert json.loads(packed).keys() == {"value", "until"}
    assert changes["lifetime"] == b"2592000.0"


# ---- what is encrypted

KEY: Final = bytes(range(32))
FIELDS: Final = {
    "v": "004e4531caec9c5641dd74cc3d956f1a511ef6bbd1cf415906951ae500f4441310f55abdd0",
    "state:x": "004e4531caec9c563ff35f133b6b5e019fbc527b3ac00623b2b4cbb1875cea397eeb152b45",
}
OPENED: Final = (
    (
        "004e4531caec9c56d506270dcb3ccdda6f1a385a039e6b28a282509220000000000000000100000000fc3f3b5da2705ee916b2d3b208dff525"
        "e4d30be1"
    ),
    (
        "004e4531caec9c567b211f3f37e874af5e53ea10039e6b28a282509220000000000000000100000001a475804ccbc0c21e8600f0e4f0e7aa12"
        "20dd007b"
    ),
)
ASIDE: Final = (
    "004e4531caec9c566a765b74e30a4b615fedb68c02a3eb179576dcf79d000000000000000300000000eed376091ac74ac0c1c8f729aa3a65c7"
    "8e80c8df"
)
ENDED: Final = (
    "004e4531caec9c560b437722baf5b0ff30f25c98029e6b28a28250922000000000000000020000000040cf9ca74b100d39d64430293a117488"
    "bec8cf18"
)


async def test_encrypted_text_is_readable_for_ever() -> None:
    """P13: with the same key, for the same deployment, of the same session."""
    key = "a" * 40
    inner = MemoryStore()
    async with nonstick.EncryptedStore(inner, [KEY], deployment="shop") as store:
        assert store.key_names == ["caec9c56"]
        await store.create(key, {"v": b"1", "state:x": b"7"}, lifetime=60)
        stored = (await inner.load(key)).fields
        assert {name: value.hex() for name, value in stored.items()} == FIELDS
        first, second = (bytes.fromhex(text) for text in OPENED)
        await inner.append(key, Batch([Draft(b"8 bytes.", first), Draft(b"9 bytes.", second)], stream=NEW_STREAM))
        await inner.append(key, Batch([Draft(b"0 bytes.", bytes.fromhex(ASIDE))]))
        await inner.append(key, Batch([Draft(b"1 bytes.", bytes.fromhex(ENDED))], stream=1, terminal=True))
        events = await store.read(key, Cursor(0))
        assert [event.data for event in events] == [b"1o{}", b"1m{}", b"1r{}", b"1t{}"]
        assert (await store.load(key)).size == 16
