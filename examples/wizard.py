"""A wizard: one call that asks the user several questions. Each answer may arrive at any node (P4).

uvicorn examples.wizard:app --workers 4
"""

from __future__ import annotations

import os
from typing import Literal

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from pydantic import BaseModel, Field

import nonstick

mcp = MCPServer("wizard")


class Trip(BaseModel):
    """The first page."""

    to: str = Field(description="Where do you want to go?")
    nights: int = Field(description="For how many nights?", ge=1, le=30)


class Room(BaseModel):
    """The second page."""

    kind: Literal["single", "double", "suite"] = Field(description="Which room?")


class Confirmation(BaseModel):
    """The last page."""

    book: bool = Field(description="Book it?")


@mcp.tool()
async def book_trip(ctx: Context) -> str:
    """Books a trip, step by step. The handler simply waits: its node follows the session's log for the answers."""
    trip = await ctx.elicit("Let us plan your trip.", schema=Trip)
    if trip.action != "accept":
        return "Nothing was booked."
    room = await ctx.elicit(f"{trip.data.nights} nights in {trip.data.to}.", schema=Room)
    if room.action != "accept":
        return "Nothing was booked."
    summary = f"{trip.data.nights} nights in {trip.data.to}, {room.data.kind} room"
    last = await ctx.elicit(f"{summary}. Shall I book it?", schema=Confirmation)
    if last.action != "accept" or not last.data.book:
        return "Nothing was booked."
    # What is kept for the session is there for its next call, on whichever node that runs.
    state = nonstick.current_connection().state
    state["booked"] = [*state.get("booked", []), summary]
    return f"Booked: {summary}."


@mcp.tool()
def bookings() -> list[str]:
    """What this session has booked."""
    booked: list[str] = nonstick.current_connection().state.get("booked", [])
    return booked


app = nonstick.app(mcp, store=os.environ.get("NONSTICK_STORE", "sqlite:///wizard.db"))
