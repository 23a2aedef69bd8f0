"""The tables of a run, as Markdown.

python -m bench.report bench/results/DATE.json          # prints them
python -m bench.report bench/results/DATE.json --docs   # also writes them, and the plots, into docs/
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from bench.budgets import SDK, SDK_JSON, budgets, limit_of, ratio_of
from bench.instructions import ratios

__all__ = ["tables"]

PAGE: Final = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN: Final = "<!-- begin: written by python -m bench.report -->\n"
END: Final = "<!-- end -->\n"

Lines = list[dict[str, Any]]


def tables(results: dict[str, Any]) -> str:
    """Of all parts that were run, the budgets first."""
    parts = [_environment(results), _budgets(results), *_requests(results)]
    for name, table in _TABLES.items():
        if name in results:
            parts.append(table(results[name]))
    return "\n".join(parts)


def _environment(results: dict[str, Any]) -> str:
    here = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    rows = [
        [
            name,
            one["date"],
            one["code"],
            f"`{one['command']}`",
            f"{one['load_before']:.1f} / {one['load_after']:.1f}",
            _took(one),
        ]
        for name, one in results["parts"].items()
    ]
    runs = _table("Parts of the run", ["", "date", "commit", "command", "load average before / after", "took"], rows)
    return f"{here['cpu']}, {here['cores']} cores, {here['system']}, Python {here['python']}; {versions}.\n\n{runs}"


def _took(part: dict[str, Any]) -> str:
    minutes, seconds = divmod(round(part["seconds"]), 60)
    return f"{minutes}:{seconds:02}"


def _budgets(results: dict[str, Any]) -> str:
    rows = [
        [one.what, f"{one.value:.2f} {one.unit}", f"{one.limit:.2f} {one.unit}", "met" if one.met else "**missed**"]
        for one in budgets(results)
    ]
    return _table("Budgets", ["", "measured", "at most", ""], rows)


def _requests(results: dict[str, Any]) -> Iterator[str]:
    head = ["", "CPU µs", "to SDK", "to SDK, JSON", "to the limit", "p50 ms", "p99 ms", "p99/p50", "a second"]
    lines = results.get("requests", [])
    for workload in dict.fromkeys(one["workload"] for one in lines):
        rows = []
        for one in lines:
            if one["workload"] != workload:
                continue
            against = (SDK, SDK_JSON, limit_of(one["name"]))
            ratios = [_ratio(ratio_of(results, workload, one["name"], other)) for other in against]
            times = [f"{one['p50_ms']:.2f}", f"{one['p99_ms']:.2f}", f"{one['p99_ms'] / one['p50_ms']:.1f}"]
            rows.append([one["name"], f"{one['cpu_us']:.0f}", *ratios, *times, f"{one['rate']:.0f}"])
        yield _table(workload, head, rows)


def _ratio(found: float | None) -> str:
    return "" if found is None else f"{found:.2f}"


def _latency(lines: Lines) -> str:
    rows = [
        [one["store"], one["what"], str(one["events"]), *(f"{one[name]:.2f}" for name in ("p50", "p99", "max"))]
        for one in lines
    ]
    return _table("Across nodes, ms", ["store", "", "events", "p50", "p99", "max"], rows)


def _arrivals(steps: Lines) -> str:
    rows = [
        [
            one["name"],
            f"{one['rate']:.0f}",
            f"{one['achieved']:.0f}",
            "yes" if one["sustained"] else "no",
            str(one["errors"]),
            f"{one['p50_ms']:.1f}",
            f"{one['p99_ms']:.1f}",
            f"{one['nodes_cpu']:.2f}",
            f"{one['client_cpu']:.2f}",
        ]
        for one in steps
    ]
    head = ["", "due a second", "opened", "sustained", "errors", "p50 ms", "p99 ms", "nodes, cores", "load, cores"]
    return _table("Sessions opened at a fixed rate", head, rows)


def _resume(lines: Lines) -> str:
    rows = [
        [
            one["name"],
            f"{one['first_p50_ms']:.1f}",
            f"{one['last_p50_ms']:.1f}",
            f"{one['last_max_ms']:.1f}",
            f"{one['cpu_us_per_event']:.0f}",
        ]
        for one in lines
    ]
    head = ["", "first, p50 ms", "last, p50 ms", "last, max ms", "CPU µs per event"]
    return _table(f"Resume of a stream of {lines[0]['events']:,} events: time to the first and to the last", head, rows)


def _idle(lines: Lines) -> str:
    rows = []
    for one in lines:
        stored = one["store_bytes_per_session"]
        rows.append(
            [
                one["opponent"],
                str(one["sessions"]),
                f"{one['node_bytes_per_session']:.0f}",
                "" if stored is None else f"{stored:.0f}",
                f"{one['few']['cpu_us']:.0f} / {one['many']['cpu_us']:.0f}",
                f"{one['few']['round_trips']:.2f} / {one['many']['round_trips']:.2f}",
            ]
        )
    head = ["", "sessions", "node, bytes each", "store, bytes each", "echo, CPU µs, few / many", "round trips"]
    return _table("Idle sessions", head, rows)


def _streams(streams: dict[str, Any]) -> str:
    told = streams["broadcast"]
    rows = [
        ["open GET streams, over three nodes", str(streams["streams"])],
        ["memory of the nodes per stream, KiB", f"{streams['bytes_per_stream'] / 1024:.1f}"],
        ["opening: CPU per stream, µs", f"{streams['cpu_us_per_open']:.0f}"],
        ["opening: GETs that were refused with 503, and came again", str(streams["refused"])],
        ["CPU of the nodes while nothing happens, cores", f"{streams['idle_cores']:.2f}"],
        ["broadcast: first / p50 / last stream, ms", " / ".join(f"{told[f'{n}_ms']:.1f}" for n in _TOLD)],
        ["broadcast: CPU per stream, µs", f"{told['cpu_us_per_stream']:.0f}"],
    ]
    return _table("Open streams", ["", ""], rows)


def _flat(lines: Lines) -> str:
    rows = [
        [f"{one['sessions']:,}", str(one["nodes"]), str(one["instructions"]), str(sum(one["trips"].values()))]
        for one in lines
    ]
    return _table("One echo among many", ["sessions", "nodes", "interpreter instructions", "store round trips"], rows)


def _million(lines: Lines) -> str:
    rows = [
        [
            one["store"],
            f"{among['sessions']:,}",
            f"{among['store_bytes_per_session']:.0f}",
            f"{among['store_data_bytes_per_session']:.0f}",
            f"{among['node_bytes'] / 2**20:.1f}",
            f"{among['cpu_us']:.0f}",
            f"{among['round_trips']:.3f}",
            str(among["calls"]),
            str(among["instructions"]),
        ]
        for one in lines
        for among in one["among"]
    ]
    head = ["store", "sessions", "store, bytes each", "of it data", "three nodes, MiB", "echo, CPU µs", "round trips"]
    return _table("A million sessions", [*head, "functions called", "interpreter instructions"], rows)


def _instructions(thousands: dict[str, float]) -> str:
    limits = ratios(thousands)
    rows = [[name, f"{count:,.0f}", f"{limits[name]:.2f}"] for name, count in thousands.items()]
    return _table("Machine instructions", ["", "thousands a call", "to the limit"], rows)


_TOLD: Final = ("first", "p50", "last")
_TABLES: Final[dict[str, Callable[[Any], str]]] = {
    "latency": _latency,
    "arrivals": _arrivals,
    "resume": _resume,
    "streams": _streams,
    "idle": _idle,
    "flat": _flat,
    "million": _million,
    "instructions": _instructions,
}


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """With columns that are aligned, so that it reads well on a terminal too."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.ljust(width) if not n else cell.rjust(width) for n, (cell, width) in _with(row, widths))
        return f"| {' | '.join([first, *others])} |"

    ruler = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([f"### {title}", "", line(head), f"|{ruler}|", *map(line, rows), ""])


def _with(row: Sequence[str], widths: Sequence[int]) -> Iterator[tuple[int, tuple[str, int]]]:
    return enumerate(zip(row, widths, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--docs", action="store_true", help="write docs/performance.md and its plots too")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    text = tables(results)
    print(text)
    if options.docs:
        from bench.plots import draw

        draw(results, PAGE.parent / "performance")
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
