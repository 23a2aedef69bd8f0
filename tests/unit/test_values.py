"""Values of session state: what goes in comes out the same on another node, or is refused when it is put in."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nonstick.core.values import SessionState, check_size, encoded
from nonstick.errors import NonstickError, StateNotJSON, StateTooLarge

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
def test_every_json_value_survives_another_node(values: dict[str, Any]) -> None:
    """P2."""
    state = SessionState()
    state.update(values)
    changes = state.changes()
    assert on_another_node({name: data for name, data in changes.items() if data is not None}) == values
    state.saved(changes)
    assert state.changes() == {}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["set", "drop", "save"]), st.integers())))
def test_saved_changes_make_the_state(steps: list[tuple[str, str, int]]) -> None:
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
def test_unserialisable_value_is_refused_when_put(value: Any) -> None:
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


def test_subclass_value_is_refused() -> None:
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


def test_error_names_key_and_type_only() -> None:
    """P13."""
    with pytest.raises(StateNotJSON, match=r"'token' holds a bytes") as caught:
        SessionState()["token"] = b"secret"
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value, NonstickError | TypeError)


@pytest.mark.parametrize("key", ["", "ü", "a\n", "x" * 257, 7])
def test_impossible_key_is_refused(key: Any) -> None:
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


def test_transient_bad_value_disturbs_no_refresh() -> None:
    """Another request of the session may come while a handler is at work."""
    state = on_another_node({"state:cart": b"[]"})
    state["cart"].append(object())
    state.refresh({"cart": b"[1]", "new": b"2"})
    state["cart"][:] = ["tea"]
    assert state == {"cart": ["tea"], "new": 2}
    assert state.changes() == {"state:cart": b'["tea"]'}


def test_unsaved_changes_can_be_forgotten() -> None:
    """P7."""
    state = on_another_node({"state:a": b"[1]", "state:b": b"2"})
    state["a"].append(object())
    state["c"] = 3
    del state["b"]
    state.revert()
    assert state == {"a": [1], "b": 2}
    assert state.changes() == {}


def test_foreign_changes_spare_local_ones() -> None:
    """P2."""
    state = on_another_node({"state:a": b"1", "state:b": b"1", "state:c": b"1", "state:d": b"1"})
    state["a"] = "here"
    del state["b"]
    state.refresh({"a": b"2", "b": b"2", "c": b"2", "e": b"2"})
    assert state == {"a": "here", "c": 2, "e": 2}
    assert state.changes() == {"state:a": b'"here"', "state:b": None}


def test_local_change_outlasts_foreign_removal() -> None:
    """P2: what is saved last counts."""
    state = on_another_node({"state:a": b"[1]", "state:b": b"1"})
    state["a"].append(2)
    state.refresh({})
    assert state == {"a": [1, 2]}
    assert state.changes() == {"state:a": b"[1,2]"}


def test_older_record_is_passed_over() -> None:
    """P2: of two requests, the one that was loaded first may come here last."""
    state = SessionState()
    state.refresh({"n": b"2"}, 2)
    state.refresh({"n": b"1"}, 1)
    assert state == {"n": 2}
    state.adopt("n", b"4", 4)
    state.adopt("m", b"3", 3)  # its answer came later
    state.refresh({"n": b"3", "m": b"3"}, 3)
    assert state == {"n": 4, "m": 3}
    state.refresh({"n": b"5"}, 5)
    assert state == {"n": 5}
    assert state.changes() == {}


def test_atomic_value_replaces_unsaved_one() -> None:
    """P2: it was made from that."""
    state = on_another_node({"state:n": b"1"})
    state["n"] = 7
    state["m"] = 8
    assert [state.unsaved(key) for key in ("n", "m", "o")] == [(7,), (8,), None]
    state.adopt("n", b"9", 1)
    assert state == {"n": 9, "m": 8}
    assert state.unsaved("n") is None
    del state["n"]
    assert state.unsaved("n") == ()
    state.adopt("n", None, 2)
    assert state.unsaved("n") is None
    assert state.changes() == {"state:m": b"8"}


def test_oversized_state_is_rolled_back() -> None:
    """P10: no later request of the session fails for it."""
    state = SessionState(limit=20)
    state.refresh({"a": b"1"})
    state["a"] = 2
    state["b"] = "x" * 20
    with pytest.raises(StateTooLarge):
        state.changes()
    assert state == {"a": 1}
    assert state.changes() == {}
    state["b"] = 1
    assert state.changes() == {"state:b": b"1"}


def test_key_may_fill_a_fields_name() -> None:
    state = SessionState()
    state["x" * 256] = 1
    assert list(state.changes()) == ["state:" + "x" * 256]


def test_copy_is_a_plain_dict() -> None:
    """And no pickle of ours is ever made (P13)."""
    state = SessionState()
    state["a"] = [1]
    copies = [copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state)), dict(state)]
    for one in copies:
        assert type(one) is dict
        assert one == {"a": [1]}


def test_size_counts_names_and_values() -> None:
    """P10: bytes, of what there will be."""
    fields = {"state:a": b"12345", "state:b": b"1"}  # 7 + 5, 7 + 1
    check_size(fields, {"state:c": b"123"}, 30)
    with pytest.raises(StateTooLarge, match=r"at most 29 bytes of state \(max_state_bytes\), and .* make it 30\."):
        check_size(fields, {"state:c": b"123"}, 29)
    check_size(fields, {"state:a": b"123456"}, 21)
    check_size(fields, {"state:a": None, "state:c": b"12345"}, 20)
    with pytest.raises(StateTooLarge, match="at most 1048576 bytes"):
        check_size({}, {"state:a": b"x" * 1048576}, 1024 * 1024)


def test_oversized_state_may_shrink() -> None:
    """P10: where a limit was lowered."""
    fields = {"state:a": b"123456"}
    check_size(fields, {"state:a": b"12345"}, 5)
    check_size(fields, {"state:a": b"654321"}, 5)
    with pytest.raises(StateTooLarge):
        check_size(fields, {"state:a": b"1234567"}, 5)


@pytest.mark.parametrize("value", [{1: "a"}, {"a": {None: 1}}, object(), float("inf"), b"x", {1, 2}])
def test_foreign_values_are_not_encoded(value: Any) -> None:
    """Also a key that JSON would make a text of."""
    assert encoded(value) is None
    assert encoded({"in": [value]}) is None
