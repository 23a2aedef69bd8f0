"""placement="stateless": no sessions. Nothing is kept between two requests.

For tools that need nothing but their arguments: no questions to the user, no progress that survives a broken
connection, no news. See docs/patterns.md.

uvicorn examples.placement_stateless:app --workers 4
"""

from __future__ import annotations

from typing import Any

from mcp.server import MCPServer

import nonstick

mcp: MCPServer[Any] = MCPServer("converter")


@mcp.tool()
def fahrenheit(celsius: float) -> float:
    """Converts a temperature."""
    return celsius * 9 / 5 + 32


app = nonstick.app(mcp, store="memory:", placement="stateless", node_header=True)
