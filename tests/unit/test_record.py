"""What a session record holds, and how session state gets into it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp_types import InitializeRequestParams

from nonstick.core.record import Record, SessionState, opening_fields, subscription_field
from nonstick.errors import NonstickError, StateNotJSON, StoreUnavailable

CLIENT = InitializeRequestParams.model_validate(
    {
        "protocolVersion": "2025-11-25",
        "capabilities": {"sampling": {}, "experimental": {"x": {"y": 1}}},
        "clientInfo": {"name": "ü", "version": "1"},
        "_meta": {"kept": [1]},
    },
    by_name=False,
)


def test_record_is_what_was_opened() -> None:
    """P2."""
    record = Record.from_fields(opening_fields("2025-06-18", CLIENT, b"ada"))
    assert record.protocol_version == "2025-06-18"
    assert record.client_params == CLIENT
    assert record.principal == b"ada"
    assert (record.initialized, record.log_level, record.subscriptions, record.state) == (False, None, frozenset(), {})


def test_record_has_what_was_added_and_passes_over_what_it_does_not_know() -> None:
    """P2, P12."""
    fields = opening_fields("2025-11-25", CLIENT, b"") | {
        "initialized": b"1",
        "level": b"error",
        subscription_field("memo://ü"): "memo://ü".encode(),
        "state:user": b'"ada"',
        "of a later version": b"\xff",
    }
    record = Record.from_fields(fields)
    assert record.initialized
    assert record.log_level == "error"
    assert record.subscriptions == {"memo://ü"}
    assert record.state == {"user": b'"ada"'}


@pytest.mark.parametrize("version", [b"2", b"", b"\x00NE1 ciphertext", None])
def test_record_of_another_format_is_not_readable_yet(version: bytes | None) -> None:
    """P9, P12: of a newer release, or encrypted. The session lives, so it is 503 and never 404."""
    fields = opening_fields("2025-11-25", CLIENT, b"")
    if version is None:
        del fields["v"]
    else:
        fields["v"] = version
    with pytest.raises(StoreUnavailable, match="another version of nonstick"):
        Record.from_fields(fields)


def test_field_of_a_subscription_fits_any_uri() -> None:
    """A field's name is visible ASCII, at most 512 characters."""
    for uri in ("memo://a", "memo://" + "x" * 10_000, "memo://ü\n"):
        name = subscription_field(uri)
        assert name.isascii()
        assert name.isprintable()
        assert len(name) <= 512
    assert subscription_field("memo://a") != subscription_field("memo://b")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=20)


def on_another_node(stored: dict[str, bytes]) -> SessionState:
    state = SessionState()
    state.refresh({name.removeprefix("state:"): data for name, data in stored.items()})
    return state


@given(st.dictionaries(KEYS, JSON, max_size=5))
def test_every_json_value_is_the_same_on_another_node(values: dict[str, Any]) -> None:
    """P2."""
    state = SessionState()
    state.update(values)
    changes = state.changes()
    assert on_another_node({name: data for name, data in changes.items() if data is not None}) == values
    state.saved(changes)
    assert state.changes() == {}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["set", "drop", "save"]), st.integers())))
def test_saved_changes_add_up_to_the_state(steps: list[tuple[str, str, int]]) -> None:
    """P2: whatever was changed, and saved, in whichever order."""
    state, stored = SessionState(), dict[str, bytes]()
    for key, step, value in [*steps, ("a", "save", 0)]:
        if step == "set":
            state[key] = value
        elif step == "drop":
            state.pop(key, None)
        else:
            changes = state.changes()
            for name, data in changes.items():
                if data is None:
                    del stored[name]
                else:
                    stored[name] = data
            state.saved(changes)
    assert on_another_node(stored) == state


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [object(), b"bytes", {1, 2}, 1j, float("nan"), float("inf"), {1: "int key"}, [object()], {"a": {"b": lambda: 0}}],
)
def test_value_that_json_cannot_hold_is_refused_when_it_is_put_in(value: Any) -> None:
    """P2: by every way of putting it in; and what was there stays."""
    state = SessionState()
    state["key"] = "before"
    ways: list[Any] = [
        lambda: state.__setitem__("key", value),
        lambda: state.update(key=value),
        lambda: state.update({"key": value}),
        lambda: state.update([("key", value)]),
        lambda: state.setdefault("new", value),
        lambda: state.__ior__({"key": value}),
    ]
    for way in ways:
        with pytest.raises(StateNotJSON, match=r'placement="owner"\)'):
            way()
    assert dict(state) == {"key": "before"}


def test_value_that_would_come_back_as_another_type_is_refused() -> None:
    """P2: a subclass would be a plain value on other nodes."""
    state = SessionState()
    for value in (Text("x"), [Text("x")]):
        with pytest.raises(StateNotJSON):
            state["key"] = value


def test_endless_value_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(StateNotJSON):
        SessionState()["key"] = endless


def test_error_names_the_key_and_type_and_not_the_value() -> None:
    """P13."""
    with pytest.raises(StateNotJSON, match=r"'token' holds a bytes") as caught:
        SessionState()["token"] = b"secret"
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value, NonstickError | TypeError)


@pytest.mark.parametrize("key", ["", "ü", "a\n", "x" * 257, 7])
def test_key_that_no_field_can_have_is_refused(key: Any) -> None:
    with pytest.raises(StateNotJSON):
        SessionState()[key] = 1


def test_change_in_place_is_noticed() -> None:
    """P2."""
    state = on_another_node({"state:cart": b'["tea"]'})
    assert state.changes() == {}
    state["cart"].append("milk")
    assert state.changes() == {"state:cart": b'["tea","milk"]'}
    state["cart"].append(object())
    state["good"] = 1
    with pytest.raises(StateNotJSON, match="'cart'"):
        state.changes()
    # The value is again what it was, and the rest can be saved.
    assert state.changes() == {"state:good": b"1"}
    assert state == {"cart": ["tea"], "good": 1}


def test_value_that_is_not_json_for_a_moment_disturbs_no_refresh() -> None:
    """Another request of the session may come while a handler is at work."""
    state = on_another_node({"state:cart": b"[]"})
    state["cart"].append(object())
    state.refresh({"cart": b"[1]", "new": b"2"})
    state["cart"][:] = ["tea"]
    assert state == {"cart": ["tea"], "new": 2}
    assert state.changes() == {"state:cart": b'["tea"]'}


def test_what_is_not_saved_can_be_forgotten() -> None:
    """P7."""
    state = on_another_node({"state:a": b"[1]", "state:b": b"2"})
    state["a"].append(object())
    state["c"] = 3
    del state["b"]
    state.revert()
    assert state == {"a": [1], "b": 2}
    assert state.changes() == {}


def test_what_another_node_saved_is_taken_over_but_for_what_was_changed_here() -> None:
    """P2."""
    state = on_another_node({"state:a": b"1", "state:b": b"1", "state:c": b"1", "state:d": b"1"})
    state["a"] = "here"
    del state["b"]
    state.refresh({"a": b"2", "b": b"2", "c": b"2", "e": b"2"})
    assert state == {"a": "here", "c": 2, "e": 2}
    assert state.changes() == {"state:a": b'"here"', "state:b": None}


def test_copy_is_a_plain_dict() -> None:
    """And no pickle of ours is ever made (P13)."""
    state = SessionState()
    state["a"] = [1]
    copies = [copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state)), dict(state)]
    for one in copies:
        assert type(one) is dict
        assert one == {"a": [1]}
