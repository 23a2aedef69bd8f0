"""The bodies of JSON-RPC messages, and how deep JSON may go."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp_types import ErrorData
from pydantic_core import PydanticSerializationError

from nonstick.core.jsonrpc import error_body, json_depth_exceeds, notification_body, request_body, result_body


def test_bodies_are_json_rpc() -> None:
    assert json.loads(result_body("7", {"a": float("inf"), "ü": 1})) == {
        "jsonrpc": "2.0",
        "id": "7",
        "result": {"a": None, "ü": 1},
    }
    assert json.loads(error_body(None, ErrorData(code=-1, message="no"))) == {
        "jsonrpc": "2.0",
        "id": None,
        "error": {"code": -1, "message": "no"},
    }
    assert json.loads(error_body(3, ErrorData(code=-1, message="no", data=[1])))["error"]["data"] == [1]
    assert json.loads(request_body("srv-1", "ping", None)) == {"jsonrpc": "2.0", "id": "srv-1", "method": "ping"}
    assert "params" not in json.loads(request_body("srv-1", "ping", {}))
    assert json.loads(notification_body("n", {"x": 1})) == {"jsonrpc": "2.0", "method": "n", "params": {"x": 1}}
    assert "params" not in json.loads(notification_body("n", None))


def test_unserialisable_result_is_refused() -> None:
    with pytest.raises(PydanticSerializationError):
        result_body(1, {"a": object()})


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(
    st.recursive(st.none(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=1), inner)),
    st.integers(0, 6),
)
def test_depth_counts_lists_and_objects(value: Any, limit: int) -> None:
    """P10."""
    assert json_depth_exceeds(value, limit) == (depth(value) > limit)


def test_very_deep_value_is_no_trouble() -> None:
    deep: Any = None
    for _ in range(100_000):
        deep = [deep]
    assert json_depth_exceeds(deep, 64)
    while deep:  # taken apart from outside: freeing it at once would recurse
        deep = deep[0]
