"""placement="owner": one node holds the session, the others relay to it through the log.

For state that no store can hold: here an open database transaction, elsewhere a browser page or a running shell. Any
node may be asked; the tools run where the transaction is. When that node is lost, another one opens a new connection
and says that what was not committed is gone. See docs/patterns.md.

uvicorn examples.placement_owner:app --workers 4
"""

from __future__ import annotations

import os
import sqlite3
from typing import Any

from mcp.server import MCPServer
from mcp.server.connection import Connection
from mcp.server.mcpserver.exceptions import ToolError

import nonstick

LEDGER = os.environ.get("LEDGER", "ledger.db")
mcp: MCPServer[Any] = MCPServer("ledger")


def open_ledger(connection: Connection) -> sqlite3.Connection:
    """The session's own connection. Closed, its transaction rolled back, when the session ends or moves."""
    ledger = sqlite3.connect(LEDGER, isolation_level=None)
    ledger.execute("CREATE TABLE IF NOT EXISTS entry (account TEXT, amount INTEGER)")
    connection.state["ledger"] = ledger
    connection.exit_stack.callback(ledger.close)
    return ledger


async def rehydrate(connection: Connection) -> None:
    """The node that held the session is gone: what can be had again is a connection, not the transaction."""
    open_ledger(connection)
    connection.state["rolled back"] = True


def session_ledger() -> sqlite3.Connection:
    """The connection that this session has open, on the node that runs this."""
    connection = nonstick.current_connection()
    if connection.state.pop("rolled back", False):
        raise ToolError("What was not committed was rolled back, because a server node was replaced. Begin again.")
    ledger: sqlite3.Connection | None = connection.state.get("ledger")
    return ledger or open_ledger(connection)


@mcp.tool()
async def enter(account: str, amount: int) -> str:
    """Enters an amount, which others see once it is committed."""
    ledger = session_ledger()
    if not ledger.in_transaction:
        ledger.execute("BEGIN")
    ledger.execute("INSERT INTO entry VALUES (?, ?)", (account, amount))
    return "entered, not committed"


@mcp.tool()
async def balance(account: str) -> int:
    """The account's balance, as this session sees it."""
    rows = session_ledger().execute("SELECT coalesce(sum(amount), 0) FROM entry WHERE account = ?", (account,))
    return int(rows.fetchone()[0])


@mcp.tool()
async def commit() -> str:
    """Makes what was entered last."""
    session_ledger().execute("COMMIT")
    return "committed"


app = nonstick.app(
    mcp,
    store=os.environ.get("NONSTICK_STORE", "sqlite:///ledger-sessions.db"),
    placement="owner",
    rehydrate=rehydrate,
    node_header=True,
)
