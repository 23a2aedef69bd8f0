"""Plots of a run, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = ["draw"]

OURS: Final = "#1f6feb"
THEIRS: Final = "#9aa4b1"
LINE: Final = "#d1242f"

# The same results make the same files.
mpl.rcParams["svg.hashsalt"] = "nonstick"


def draw(results: dict[str, Any], folder: Path) -> None:
    """Writes them into this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for workload in dict.fromkeys(one["workload"] for one in results.get("requests", ())):
        name = workload.removesuffix("s").removesuffix(" connection").replace(", ", "-")
        _save(_cpu(results, workload), folder / f"cpu-{name}")
    if "requests" in results:
        _save(_times(results, "echo, 16 connections"), folder / "latency-echo-16")
    if "latency" in results:
        _save(_across(results["latency"]), folder / "across-nodes")
    if "idle" in results:
        _save(_memory(results["idle"]), folder / "idle-sessions")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path.with_suffix(".png"), dpi=110)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _of(results: dict[str, Any], workload: str) -> list[dict[str, Any]]:
    return [one for one in reversed(results["requests"]) if one["workload"] == workload]


def _color(name: str) -> str:
    return OURS if name.startswith("nonstick") else THEIRS


def _cpu(results: dict[str, Any], workload: str) -> Figure:
    lines = _of(results, workload)
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(lines)), layout="constrained")
    axes = figure.subplots()
    names = [one["name"] for one in lines]
    bars = axes.barh(names, [one["cpu_us"] for one in lines], color=[_color(name) for name in names])
    axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axes.set_title(f"{workload}: server CPU per request, µs")
    axes.margins(x=0.1)
    return figure


def _times(results: dict[str, Any], workload: str) -> Figure:
    lines = _of(results, workload)
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for row, one in enumerate(lines):
        axes.plot([one["p50_ms"], one["p99_ms"]], [row, row], color=_color(one["name"]), linewidth=2, zorder=1)
        axes.scatter([one["p50_ms"]], [row], color=_color(one["name"]), zorder=2)
        axes.scatter([one["p99_ms"]], [row], color=_color(one["name"]), marker="|", zorder=2)
    axes.set_yticks(range(len(lines)), [one["name"] for one in lines])
    axes.set_xscale("log")
    axes.set_title(f"{workload}: p50 (dot) to p99 (bar), ms")
    return figure


def _across(lines: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    names = [f"{one['store']}\n{one['what']}" for one in lines]
    places = range(len(lines))
    axes.bar([place - 0.2 for place in places], [one["p50"] for one in lines], width=0.4, color=OURS, label="p50")
    axes.bar([place + 0.2 for place in places], [one["p99"] for one in lines], width=0.4, color=THEIRS, label="p99")
    axes.set_xticks(places, names, fontsize=8)
    axes.set_yscale("log")
    axes.legend()
    axes.set_title("From one node to another, ms")
    return figure


def _memory(idle: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for one in idle:
        _, first = one["samples"][0]
        counts = [count for count, _ in one["samples"]]
        grown = [(memory - first) / 2**20 for _, memory in one["samples"]]
        label = f"{one['opponent']}: {one['node_bytes_per_session']:.0f} bytes a session"
        axes.plot(counts, grown, marker="o", color=_color(one["opponent"]), label=label)
    axes.set_xlabel("idle sessions")
    axes.legend()
    axes.set_title("Memory that the nodes took for them, MiB")
    return figure
