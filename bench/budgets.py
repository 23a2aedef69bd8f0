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
SERVE: Final = "nonstick serve valkey, 1 node"


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


def added(results: dict[str, Any], workload: str, one: str, other: str) -> float | None:
    """What the one costs more than the other, in CPU per request of the limit, if all three were measured."""
    lines = [line_of(results, workload, name) for name in (one, other, LIMIT)]
    mine, theirs, least = (line["cpu_us_rounds"] if line else [] for line in lines)
    if not (mine and theirs and least):
        return None
    return paired([more - less for more, less in zip(mine, theirs, strict=True)], least)


def budgets(results: dict[str, Any]) -> list[Budget]:
    """All that this run says something about."""
    return [
        *_requests(results),
        *_across(results),
        *_arrivals(results),
        *_many(results),
        *_flat(results),
        *_million(results),
    ]


def _requests(results: dict[str, Any]) -> Iterator[Budget]:
    echo, progress, opening = (f"{tool}, 16 connections" for tool in ("echo", "progress", "initialize"))
    one, three = "nonstick valkey, 1 node", "nonstick valkey, 3 nodes"

    def ratio(what: str, workload: str, ours: str, other: str, limit: float) -> Iterator[Budget]:
        if (found := ratio_of(results, workload, ours, other)) is not None:
            yield Budget(f"{what}: CPU, ratio to {other}", found, limit)

    for nodes, ours, limits, sse in (("1 node", one, (1.7, 1.45), 0.35), ("3 nodes", three, (1.9, 1.6), 0.5)):
        yield from ratio(f"echo on Valkey, {nodes}", echo, ours, SDK, 0.21)
        yield from ratio(f"echo on Valkey, {nodes}", echo, ours, SDK_JSON, 0.55)
        yield from ratio(f"echo on Valkey, {nodes}", echo, ours, limit_of(ours), limits[0])
        yield from ratio(f"echo on Valkey, {nodes}, low-level", echo, f"{ours}, low-level", limit_of(ours), limits[1])
        if line := line_of(results, echo, ours):
            yield Budget(f"echo on Valkey, {nodes}: p99, ratio to p50", line["p99_ms"] / line["p50_ms"], 3.0)
        yield from ratio(f'echo, answer="sse", on Valkey, {nodes}', echo, f"{ours}, sse", SDK, sse)
        yield from ratio(f"opening a session on Valkey, {nodes}", opening, ours, SDK, 0.28)
        yield from ratio(f"10 notifications on Valkey, {nodes}", progress, ours, SDK, 0.55)
    if (adds := added(results, echo, SERVE, one)) is not None:
        yield Budget(f"nonstick serve: what it adds to the same app under uvicorn, in {LIMIT}", adds, 0.2)
    yield from ratio("echo in memory, 1 node", echo, "nonstick memory, 1 node", one, 1.0)
    yield from ratio("echo on SQLite, 1 node", echo, "nonstick sqlite, 1 node", one, 1.0)
    yield from ratio("echo on SQLite, 3 nodes", echo, "nonstick sqlite, 3 nodes", three, 1.0)


def _across(results: dict[str, Any]) -> Iterator[Budget]:
    limits = {"valkey": (0.9, 1.2, 10.0), "sqlite": (5.0, 5.0, None), "postgres": (10.0, 10.0, None)}
    for one in results.get("latency", ()):
        if one["what"] == "cancel" or one["store"] not in limits:
            continue
        delivery, reply, p99 = limits[one["store"]]
        most = delivery if one["what"] == "delivery" else reply
        yield Budget(f"{one['what']} on another node, {one['store']}: p50", one["p50"], most, "ms")
        if p99 is not None:
            yield Budget(f"{one['what']} on another node, {one['store']}: p99", one["p99"], p99, "ms")


def _arrivals(results: dict[str, Any]) -> Iterator[Budget]:
    for one in results.get("arrivals", ()):
        if (one["name"], one["rate"]) == ("nonstick valkey, 3 nodes", 1000):
            yield Budget(f"1,000 initialize a second, {one['name']}: p99", one["p99_ms"], 50, "ms")


def _many(results: dict[str, Any]) -> Iterator[Budget]:
    if idle := results.get("idle"):
        ours = idle[0]
        slope = ours["node_bytes_per_session"]
        yield Budget("idle session: slope of the nodes' memory, all three together", slope, 100, "bytes")
        yield Budget("idle session: in the store", ours["store_bytes_per_session"] / 1024, 0.75, "KiB")
        # The store counts the nodes' leases, too.
        trips = ours["many"]["round_trips"]
        yield Budget(f"store round trips per echo, leases included, {ours['sessions']:,} sessions", trips, 1.02)
    if streams := results.get("streams"):
        yield Budget("open GET stream: memory of the nodes", streams["bytes_per_stream"] / 1024, 24, "KiB")
        if streams["streams"] >= 10_000:
            what = f"{streams['streams']:,} open GET streams: CPU of the nodes while nothing happens"
            yield Budget(what, streams["idle_cores"], 0.1, "cores")


def _flat(results: dict[str, Any]) -> Iterator[Budget]:
    if lines := results.get("flat"):
        sessions, nodes = (max(one[what] for one in lines) for what in ("sessions", "nodes"))
        among = f"per echo, up to {sessions:,} sessions, {nodes} nodes"
        worst = max(one["instructions"] for one in lines) / lines[0]["instructions"]
        # Ids of other lengths and the like cost a few more.
        yield Budget(f"instructions {among}: ratio to alone", worst, 1.03)
        yield Budget(f"store round trips {among}", max(sum(one["trips"].values()) for one in lines), 1)


def _million(results: dict[str, Any]) -> Iterator[Budget]:
    for one in results.get("million", ()):
        few, many = one["among"]
        among = f"{one['store']}, {many['sessions']:,} sessions"
        grown = (many["node_bytes"] - few["node_bytes"]) / (many["sessions"] - few["sessions"])
        beside = f"ratio to {few['sessions']:,}"
        yield Budget(f"{among}: in the store, each", many["store_bytes_per_session"] / 1024, 0.75, "KiB")
        yield Budget(f"{among}: the nodes' memory, all three together, each further one", grown, 10, "bytes")
        yield Budget(f"{among}: store round trips per echo, leases included", many["round_trips"], 1.02)
        yield Budget(f"{among}: functions called per echo, {beside}", many["calls"] / few["calls"], 1.03)
        yield Budget(f"{among}: instructions per echo, {beside}", many["instructions"] / few["instructions"], 1.03)
