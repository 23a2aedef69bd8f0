"""What was promised of the figures, and whether a run has kept it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from bench.figures import paired

__all__ = ["LIMIT", "SDK", "SDK_JSON", "Budget", "budgets", "limit_of", "line_of", "ratio_of"]

SDK: Final = "mcp, in memory"
SDK_JSON: Final = "mcp, in memory, JSON"
LIMIT: Final = "bare ASGI, one read"


@dataclass(frozen=True)
class Budget:
    """One promise: `value` is to be at most `limit`."""

    what: str
    value: float
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.limit


def line_of(results: dict[str, Any], workload: str, opponent: str) -> dict[str, Any] | None:
    """What was measured of this opponent at this workload, if it was."""
    return next(
        (one for one in results.get("requests", ()) if (one["workload"], one["name"]) == (workload, opponent)), None
    )


def limit_of(opponent: str) -> str:
    """The limit with as many nodes as this opponent has: the same load in fewer processes costs less."""
    return f"{LIMIT}, 3 nodes" if "3 nodes" in opponent else LIMIT


def ratio_of(results: dict[str, Any], workload: str, one: str, other: str) -> float | None:
    """CPU per request of the one to that of the other, if both were measured."""
    mine, theirs = line_of(results, workload, one), line_of(results, workload, other)
    return paired(mine["cpu_us_rounds"], theirs["cpu_us_rounds"]) if mine and theirs else None


def budgets(results: dict[str, Any]) -> list[Budget]:
    """All that this run says something about."""
    return [*_requests(results), *_across(results), *_many(results), *_flat(results)]


def _requests(results: dict[str, Any]) -> Iterator[Budget]:
    echo, progress, opening = (f"{tool}, 16 connections" for tool in ("echo", "progress", "initialize"))
    one, three = "nonstick valkey, 1 node", "nonstick valkey, 3 nodes"

    def ratio(what: str, workload: str, ours: str, other: str, limit: float) -> Iterator[Budget]:
        if (found := ratio_of(results, workload, ours, other)) is not None:
            yield Budget(f"{what}: CPU, ratio to {other}", found, limit)

    for nodes, ours in (("1 node", one), ("3 nodes", three)):
        yield from ratio(f"echo on Valkey, {nodes}", echo, ours, SDK, 0.2)
        yield from ratio(f"echo on Valkey, {nodes}", echo, ours, SDK_JSON, 0.55)
        yield from ratio(f"echo on Valkey, {nodes}", echo, ours, limit_of(ours), 2.0)
        yield from ratio(f"echo on Valkey, {nodes}, low-level", echo, f"{ours}, low-level", limit_of(ours), 1.6)
        if line := line_of(results, echo, ours):
            yield Budget(f"echo on Valkey, {nodes}: p99, ratio to p50", line["p99_ms"] / line["p50_ms"], 3.0)
        yield from ratio(f"opening a session on Valkey, {nodes}", opening, ours, SDK, 1 / 3)
        yield from ratio(f"10 notifications on Valkey, {nodes}", progress, ours, SDK, 1.0)
    yield from ratio("echo in memory, 1 node", echo, "nonstick memory, 1 node", one, 1.0)
    yield from ratio("echo on SQLite, 1 node", echo, "nonstick sqlite, 1 node", one, 1.0)
    yield from ratio("echo on SQLite, 3 nodes", echo, "nonstick sqlite, 3 nodes", three, 1.0)
    yield from ratio('echo, answer="sse", on Valkey, 3 nodes', echo, f"{three}, sse", SDK, 0.5)


def _across(results: dict[str, Any]) -> Iterator[Budget]:
    limits = {"valkey": (1.0, 10.0), "sqlite": (5.0, None), "postgres": (10.0, None)}
    for one in results.get("latency", ()):
        if one["what"] == "cancel" or one["store"] not in limits:
            continue
        p50, p99 = limits[one["store"]]
        yield Budget(f"{one['what']} on another node, {one['store']}: p50", one["p50"], p50, "ms")
        if p99 is not None:
            yield Budget(f"{one['what']} on another node, {one['store']}: p99", one["p99"], p99, "ms")


def _many(results: dict[str, Any]) -> Iterator[Budget]:
    if idle := results.get("idle"):
        ours = idle[0]
        slope = ours["node_bytes_per_session"]
        yield Budget("idle session: slope of the nodes' memory, all three together", slope, 100, "bytes")
        yield Budget("idle session: in the store", ours["store_bytes_per_session"] / 1024, 1.2, "KiB")
        # The store counts the nodes' leases, too.
        trips = ours["many"]["round_trips"]
        yield Budget(f"store round trips per echo, leases included, {ours['sessions']:,} sessions", trips, 1.02)
    if streams := results.get("streams"):
        yield Budget("open GET stream: memory of the nodes", streams["bytes_per_stream"] / 1024, 30, "KiB")


def _flat(results: dict[str, Any]) -> Iterator[Budget]:
    if lines := results.get("flat"):
        sessions, nodes = (max(one[what] for one in lines) for what in ("sessions", "nodes"))
        among = f"per echo, up to {sessions:,} sessions, {nodes} nodes"
        worst = max(one["instructions"] for one in lines) / lines[0]["instructions"]
        # Ids of other lengths and the like cost a few more.
        yield Budget(f"instructions {among}: ratio to alone", worst, 1.03)
        yield Budget(f"store round trips {among}", max(sum(one["trips"].values()) for one in lines), 1)
