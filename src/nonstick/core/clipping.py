"""What the log keeps of a client's cancels and progress: what the protocol needs, and no more. Pure.

A notification may be as long as a request. In the log it would be read by every connection of its session (P10).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mcp_types import RequestId

from nonstick.core.jsonrpc import LONGEST_ID

__all__ = ["LONGEST_TEXT", "cancel_params", "progress_params"]

LONGEST_TEXT: Final = 1024
"""Characters of a cancel's reason, or of progress in words, that are kept."""


def cancel_params(request_id: RequestId, key: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The params of `notifications/cancelled` as the log keeps them.

    Args:
        key: What names the request (`jsonrpc.request_key`): stands for an id that is too long for any request.
    """
    kept: dict[str, Any] = {"requestId": _named(request_id, key)}
    if isinstance(reason := params.get("reason"), str):
        kept["reason"] = reason[:LONGEST_TEXT]
    return kept


def progress_params(token: RequestId, key: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The params of `notifications/progress` as handlers get them, and the log keeps them."""
    kept: dict[str, Any] = {"progressToken": _named(token, key), "progress": params["progress"]}
    if (total := params.get("total")) is not None and isinstance(total, int | float):
        kept["total"] = total
    if isinstance(message := params.get("message"), str):
        kept["message"] = message[:LONGEST_TEXT]
    return kept


def _named(name: RequestId, key: str) -> RequestId:
    # A number may have thousands of digits.
    return key if len(str(name)) > LONGEST_ID else name
