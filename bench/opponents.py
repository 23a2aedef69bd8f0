"""Who is measured: each opponent is a command, and what its clients have to speak.

The Python ones are all served by the same uvicorn, with uvloop and httptools, one process a node, and import
`bench.apps`, which builds the one that `BENCH_APP` names. One is served by `nonstick serve` as it comes instead.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

__all__ = ["MANY", "OPPONENTS", "SERVE", "Opponent", "Speaks"]

Speaks = Literal["sessions", "none", "modern"]
"""`sessions`: the handshake era. `none`: the same without a session. `modern`: 2026-07-28."""

StoreKind = Literal["", "memory", "sqlite", "valkey", "postgres"]

SERVE: Final = "serve"
"""As app: `nonstick serve` with its defaults, the access log and all."""

MANY: Final = 10_000_000
"""Sessions: no run comes to a limit."""

TYPESCRIPT: Final = Path(__file__).parent / "typescript"


@dataclass(frozen=True)
class Opponent:
    """One line of the tables.

    Attributes:
        app: What `bench.apps` builds; `SERVE` for what `nonstick serve` makes of the same server; "" for the
            TypeScript SDK.
        store: What it needs a store for, if any.
        nodes: Processes that its requests are spread over.
        options: Environment of the app.
        under: The program, and its arguments, that its processes run under.
    """

    name: str
    app: str
    speaks: Speaks = "sessions"
    store: StoreKind = ""
    nodes: int = 1
    options: dict[str, str] = field(default_factory=dict[str, str])
    under: tuple[str, ...] = ()

    def command(self, port: int, node: str) -> list[str]:
        """Starts one of its processes."""
        if not self.app:
            return [*self.under, node, str(TYPESCRIPT / "server.mjs")]
        if self.app == SERVE:
            serve = ["serve", "bench.servers:mcpserver", "--port", str(port), "--set", f"max_sessions={MANY}"]
            return [*self.under, sys.executable, "-m", "nonstick", *serve]
        # A short keep-alive would cut connections of a slow opponent's clients.
        options = ["--port", str(port), "--log-level", "warning", "--loop", "uvloop", "--http", "httptools"]
        options += ["--no-access-log", "--timeout-keep-alive", "600", "--timeout-graceful-shutdown", "1"]
        return [*self.under, sys.executable, "-m", "uvicorn", "bench.apps:app", *options]

    def environment(self, port: int, url: str) -> dict[str, str]:
        named = {"BENCH_APP": self.app, "BENCH_STORE": url, "BENCH_PORT": str(port)}
        if self.app == SERVE:
            named["NONSTICK_STORE"] = url
        return {**os.environ, **self.options, **named}


def _nonstick(store: StoreKind, nodes: int, kind: str = "mcpserver", **options: str) -> Opponent:
    what = {"mcpserver": "", "lowlevel": ", low-level"}[kind]
    more = "".join(f", {value}" for value in options.values())
    name = f"nonstick {store}, {nodes} node{'s' if nodes > 1 else ''}{what}{more}"
    environment = {f"BENCH_{key.upper()}": value for key, value in options.items()}
    return Opponent(name, f"nonstick-{kind}", store=store, nodes=nodes, options=environment)


OPPONENTS: Final = {
    opponent.name: opponent
    for opponent in (
        Opponent("bare ASGI", "bare", "none"),
        Opponent("bare ASGI, one read", "bare-read", "none", "valkey"),
        Opponent("bare ASGI, one read, 3 nodes", "bare-read", "none", "valkey", nodes=3),
        _nonstick("memory", 1),
        _nonstick("sqlite", 1),
        _nonstick("sqlite", 3),
        _nonstick("valkey", 1),
        _nonstick("valkey", 3),
        _nonstick("postgres", 3),
        _nonstick("memory", 1, "lowlevel"),
        _nonstick("sqlite", 3, "lowlevel"),
        _nonstick("valkey", 1, "lowlevel"),
        _nonstick("valkey", 3, "lowlevel"),
        _nonstick("valkey", 1, answer="sse"),
        _nonstick("valkey", 3, answer="sse"),
        Opponent("nonstick serve valkey, 1 node", SERVE, store="valkey"),
        Opponent("mcp, in memory", "mcp"),
        Opponent("mcp, in memory, JSON", "mcp-json"),
        Opponent("mcp, event store", "mcp-events"),
        Opponent("mcp, stateless", "mcp-stateless", "none"),
        Opponent("mcp, 2026-07-28", "mcp", "modern"),
        Opponent("mcp, in memory, low-level", "mcp-lowlevel"),
        Opponent("FastMCP, in memory", "fastmcp"),
        Opponent("TypeScript SDK, in memory", ""),
        Opponent("TypeScript SDK, hydrated by hand", "", store="valkey"),
    )
}
