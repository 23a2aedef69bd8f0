"""Of cancels and progress the log keeps what the protocol needs (P10)."""

from __future__ import annotations

from typing import Any

import pydantic_core
import pytest

from nonstick.core.clipping import LONGEST_TEXT, cancel_params, progress_params
from nonstick.core.jsonrpc import LONGEST_ID, request_key

LONG = "x" * 4_000_000


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"requestId": 7}, {"requestId": 7}),
        ({"requestId": "7", "reason": "so", "_meta": {"x": 1}, "more": LONG}, {"requestId": "7", "reason": "so"}),
        ({"requestId": 7, "reason": LONG}, {"requestId": 7, "reason": "x" * LONGEST_TEXT}),
        ({"requestId": 7, "reason": [LONG]}, {"requestId": 7}),
        ({"requestId": "i" * LONGEST_ID}, {"requestId": "i" * LONGEST_ID}),
        ({"requestId": LONG}, {"requestId": request_key(LONG)}),
        ({"requestId": 10**2000}, {"requestId": request_key(10**2000)}),
    ],
)
def test_cancel_keeps_id_and_short_reason(params: dict[str, Any], kept: dict[str, Any]) -> None:
    found = cancel_params(params["requestId"], request_key(params["requestId"]), params)
    assert found == kept
    # Whoever reads it finds the same request.
    assert request_key(found["requestId"]) == request_key(params["requestId"])
    assert len(pydantic_core.to_json(found)) < 3000


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"progress": 1}, {"progress": 1}),
        ({"progress": 0.5, "total": 2, "message": "half"}, {"progress": 0.5, "total": 2, "message": "half"}),
        ({"progress": 1, "total": None, "message": None, "more": LONG}, {"progress": 1}),
        ({"progress": 1, "total": LONG, "message": LONG}, {"progress": 1, "message": "x" * LONGEST_TEXT}),
    ],
)
def test_progress_keeps_numbers_and_short_message(params: dict[str, Any], kept: dict[str, Any]) -> None:
    assert progress_params("t", "t", {"progressToken": "t", **params}) == {"progressToken": "t", **kept}


def test_unknown_token_is_kept_by_key() -> None:
    """What no request has as its token is kept by its key."""
    assert progress_params(LONG, request_key(LONG), {"progress": 1})["progressToken"] == request_key(LONG)
