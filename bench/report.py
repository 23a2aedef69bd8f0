"""The tables of a run, as Markdown.

python -m bench.report bench/results/DATE.json          # prints them
python -m bench.report bench/results/DATE.json --docs   # also writes them, and the plots, into docs/
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from bench.budgets import LIMIT, SDK, SDK_JSON, budgets, line_of

__all__ = ["tables"]

PAGE: Final = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN: Final = "<!-- begin: written by python -m bench.report -->\n"
END: Final = "<!-- end -->\n"


def tables(results: dict[str, Any]) -> str:
    """All of them, the budgets first."""
    parts = [_environment(results), _budgets(results), *_requests(results)]
    if results["latency"]:
        parts.append(_latency(results))
    if results.get("many"):
        parts.append(_many(results["many"]))
    return "\n".join(parts)


def _environment(results: dict[str, Any]) -> str:
    here = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    return (
        f"{results['date']}, `{results['command']}`. {here['cpu']}, {here['cores']} cores, {here['system']}, "
        f"Python {here['python']}; {versions}. Load average (1 minute): {here['load_before']:.1f} at the start, "
        f"{here['load_after']:.1f} at the end.\n"
    )


def _budgets(results: dict[str, Any]) -> str:
    rows = [
        [one.what, f"{one.value:.2f} {one.unit}", f"{one.limit:.2f} {one.unit}", "met" if one.met else "**missed**"]
        for one in budgets(results)
    ]
    return _table("Budgets", ["", "measured", "at most", ""], rows)


def _requests(results: dict[str, Any]) -> Iterator[str]:
    head = ["", "CPU µs", "to SDK", "to SDK, JSON", "to the limit", "p50 ms", "p99 ms", "p99/p50", "a second"]
    for workload in dict.fromkeys(one["workload"] for one in results["requests"]):
        against = [line_of(results, workload, name) for name in (SDK, SDK_JSON, LIMIT)]
        rows = []
        for one in results["requests"]:
            if one["workload"] != workload:
                continue
            ratios = [f"{one['cpu_us'] / other['cpu_us']:.2f}" if other else "" for other in against]
            times = [f"{one['p50_ms']:.2f}", f"{one['p99_ms']:.2f}", f"{one['p99_ms'] / one['p50_ms']:.1f}"]
            rows.append([one["name"], f"{one['cpu_us']:.0f}", *ratios, *times, f"{one['rate']:.0f}"])
        yield _table(workload, head, rows)


def _latency(results: dict[str, Any]) -> str:
    rows = [
        [one["store"], one["what"], str(one["events"]), *(f"{one[name]:.2f}" for name in ("p50", "p99", "max"))]
        for one in results["latency"]
    ]
    return _table("Across nodes, ms", ["store", "", "events", "p50", "p99", "max"], rows)


def _many(many: dict[str, Any]) -> str:
    rows = []
    for one in many["idle"]:
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
    idle = _table("Idle sessions", head, rows)
    streams, resume = many["listening"], many["resume"]
    told = streams["broadcast"]
    rest = _table(
        "Streams",
        ["", ""],
        [
            ["open GET streams, over three nodes", str(streams["streams"])],
            ["memory of the nodes per stream, KiB", f"{streams['bytes_per_stream'] / 1024:.1f}"],
            ["broadcast: first / p50 / last stream, ms", " / ".join(f"{told[f'{n}_ms']:.1f}" for n in _TOLD)],
            ["broadcast: CPU per stream, µs", f"{told['cpu_us_per_stream']:.0f}"],
            [f"resume of {resume['events']} events: p50 / max, ms", f"{resume['p50_ms']:.1f} / {resume['max_ms']:.1f}"],
            ["resume: CPU per event, µs", f"{resume['cpu_us_per_event']:.1f}"],
        ],
    )
    return f"{idle}\n{rest}"


_TOLD: Final = ("first", "p50", "last")


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
