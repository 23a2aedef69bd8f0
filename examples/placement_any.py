"""placement="any", the default: each request may run on another node, and what the session keeps is in the store.

For state that JSON can hold: a basket, a choice, a cursor in a listing. See docs/patterns.md.

uvicorn examples.placement_any:app --workers 4
"""

from __future__ import annotations

import os
from typing import Any

from mcp.server import MCPServer

import nonstick

mcp: MCPServer[Any] = MCPServer("shop")


@mcp.tool()
def add(item: str) -> list[str]:
    """Puts something into this session's basket."""
    basket: list[str] = nonstick.current_connection().state.setdefault("basket", [])
    basket.append(item)
    return basket


app = nonstick.app(mcp, store=os.environ.get("NONSTICK_STORE", "sqlite:///shop.db"), node_header=True)
