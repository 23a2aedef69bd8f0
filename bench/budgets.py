"""What was promised of the figures, and whether a run has kept it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["LIMIT", "SDK", "SDK_JSON", "Budget", "budgets", "line_of"]

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
    return next((one for one in results["requests"] if (one["workload"], one["name"]) == (workload, opponent)), None)


def budgets(results: dict[str, Any]) -> list[Budget]:
    """All that this run says something about."""
    return [*_requests(results), *_across(results), *_many(results)]


def _requests(results: dict[str, Any]) -> Iterator[Budget]:
    echo, progress, opening = (f"{tool}, 16 connections" for tool in ("echo", "progress", "initialize"))
    valkey, lowlevel = "nonstick valkey, 3 nodes", "nonstick valkey, 3 nodes, low-level"

    def ratio(what: str, workload: str, one: str, other: str, limit: float) -> Iterator[Budget]:
        mine, theirs = line_of(results, workload, one), line_of(results, workload, other)
        if mine and theirs:
            yield Budget(f"{what}: CPU, ratio to {other}", mine["cpu_us"] / theirs["cpu_us"], limit)

    yield from ratio("echo on Valkey", echo, valkey, SDK, 0.2)
    yield from ratio("echo on Valkey", echo, valkey, SDK_JSON, 0.55)
    yield from ratio("echo on Valkey", echo, valkey, LIMIT, 2.0)
    yield from ratio("echo on Valkey, low-level", echo, lowlevel, LIMIT, 1.6)
    yield from ratio("echo in memory", echo, "nonstick memory, 1 node", "nonstick valkey, 1 node", 1.0)
    yield from ratio("echo on SQLite", echo, "nonstick sqlite, 3 nodes", valkey, 1.0)
    if mine := line_of(results, echo, valkey):
        yield Budget("echo on Valkey: p99, ratio to p50", mine["p99_ms"] / mine["p50_ms"], 3.0)
    yield from ratio("opening a session on Valkey", opening, valkey, SDK, 1 / 3)
    yield from ratio("10 notifications on Valkey", progress, valkey, SDK, 1.0)
    yield from ratio('echo, answer="sse", on Valkey', echo, f"{valkey}, sse", SDK, 0.5)


def _across(results: dict[str, Any]) -> Iterator[Budget]:
    limits = {"valkey": (1.0, 10.0), "sqlite": (5.0, None), "postgres": (10.0, None)}
    for one in results["latency"]:
        if one["what"] == "cancel" or one["store"] not in limits:
            continue
        p50, p99 = limits[one["store"]]
        yield Budget(f"{one['what']} on another node, {one['store']}: p50", one["p50"], p50, "ms")
        if p99 is not None:
            yield Budget(f"{one['what']} on another node, {one['store']}: p99", one["p99"], p99, "ms")


def _many(results: dict[str, Any]) -> Iterator[Budget]:
    many = results.get("many")
    if not many:
        return
    idle = many["idle"][0]
    yield Budget(
        "idle session: slope of the nodes' memory, all three together", idle["node_bytes_per_session"], 100, "bytes"
    )
    yield Budget("idle session: in the store", idle["store_bytes_per_session"] / 1024, 1.2, "KiB")
    yield Budget("open GET stream: memory of the nodes", many["listening"]["bytes_per_stream"] / 1024, 30, "KiB")
    yield Budget("store round trips per echo, many sessions", idle["many"]["round_trips"], 1)
