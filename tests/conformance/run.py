"""Runs the official MCP conformance suite: `python -m tests.conformance.run`.

Without arguments: against the SDK's own transport, and against nonstick with one node and with three, at last while
one of the three after another is killed. A check that the SDK passes and nonstick does not is a failure, unless
`known.json` gives a reason for it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple, get_args

from tests.conformance import npm
from tests.conformance.kills import Kills
from tests.conformance.nodes import ROOT, SDK, Answer, StoreKind, balanced, nonstick, serving, store_url
from tests.conformance.results import Cells, Known, Outcome, Run, Scenario, compare, outcome, read_table, table

HOME: Final = Path(__file__).resolve().parent
REPORT: Final = ROOT / "docs" / "conformance.md"
MARK: Final = "<!-- below: python -m tests.conformance.run --write -->"

VERSIONS: Final = ("2025-03-26", "2025-06-18", "2025-11-25", "2026-07-28")
"""Every version that the suite takes."""

EXTENSION: Final = "extension"
KILLS: Final = "kills"
"""The report's last table: how many nodes were killed while the suite ran."""
SUITE_SECONDS: Final = 600.0


class Column(NamedTuple):
    """How the everything server runs: on this many nodes, with nonstick on this store or with the SDK alone."""

    nodes: int
    store: StoreKind | None = None
    answer: Answer = "auto"
    kill_every: float | None = None
    """Seconds from one node's SIGKILL to the next one's."""

    def __str__(self) -> str:
        if self.store is None:
            return f"sdk-{self.nodes}"
        answer = "" if self.answer == "auto" else f"-{self.answer}"
        return f"nonstick-{self.nodes}-{self.store}{answer}" + ("" if self.kill_every is None else "-killed")


BASELINE: Final = Column(1)
WITHOUT: Final = Column(3)
"""What the balancer does to sessions that live in one process: shown, not judged."""
COLUMNS: Final = (
    WITHOUT,
    Column(1, "sqlite"),
    Column(3, "sqlite"),
    Column(3, "valkey"),
    Column(3, "valkey", "sse"),
    Column(3, "sqlite", kill_every=4.0),
    Column(3, "valkey", kill_every=4.0),
)


class Suite:
    """The suite's command line."""

    def __init__(self) -> None:
        modules = npm.install(HOME)
        script = modules / "@modelcontextprotocol" / "conformance" / "dist" / "index.js"
        self._command = [npm.node(modules, at_least=22), str(script)]

    async def run(self, url: str) -> dict[Scenario, Outcome]:
        """Every server scenario at every version it has."""
        found: dict[Scenario, Outcome] = {}
        for version in VERSIONS:
            found |= await self._run(url, version, "--suite", "all", "--spec-version", version)
        # The suites leave these out; each runs at the version that it was written for.
        for name in await self._extensions():
            found |= await self._run(url, EXTENSION, "--scenario", name)
        return found

    async def _extensions(self) -> list[str]:
        said = await self._call("list", "--server")
        return re.findall(r"^\s*- (\S+) \[extension\]$", said, re.MULTILINE)

    async def _run(self, url: str, version: str, *which: str) -> dict[Scenario, Outcome]:
        with tempfile.TemporaryDirectory(prefix="nonstick-conformance-") as home:
            said = await self._call("server", "--url", url, "--output-dir", home, *which)
            found = read(Path(home), version)
        if not found:
            raise RuntimeError(f"the suite has run nothing for {' '.join(which)}:\n{said[-2000:]}")
        return found

    async def _call(self, *arguments: str) -> str:
        """What the suite writes. Its exit status says less than its results do: it takes warnings for success."""
        process = await asyncio.create_subprocess_exec(
            *self._command, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            async with asyncio.timeout(SUITE_SECONDS):
                said, _ = await process.communicate()
        except BaseException:
            process.kill()
            await process.wait()
            raise
        return said.decode(errors="replace")


def read(home: Path, version: str) -> dict[Scenario, Outcome]:
    """The results that the suite has put into this directory."""
    found: dict[Scenario, Outcome] = {}
    for path in sorted(home.glob("server-*/checks.json")):
        # The directory is `server-<scenario>-<time>`.
        name = re.sub(r"-\d{4}-\d\d-\d\dT[\d-]+Z$", "", path.parent.name.removeprefix("server-"))
        found[Scenario(version, name)] = outcome(json.loads(path.read_text()))
    return found


@asynccontextmanager
async def server(column: Column, kills: Kills | None) -> AsyncIterator[str]:
    """The URL of the everything server; a lone node is reached without the balancer."""
    async with AsyncExitStack() as stack:
        setup = SDK
        if column.store is not None:
            setup = nonstick(stack.enter_context(store_url(column.store)), column.answer)
        if column.nodes == 1:
            yield f"http://127.0.0.1:{await stack.enter_async_context(serving(setup))}/mcp"
        else:
            yield f"{(await stack.enter_async_context(balanced(column.nodes, setup, kills=kills))).url}/mcp"


async def run_column(suite: Suite, column: Column) -> tuple[dict[Scenario, Outcome], Kills | None]:
    start = time.monotonic()
    kills = None if column.kill_every is None else Kills(column.kill_every)
    async with server(column, kills) as url:
        found = await suite.run(url)
    failed = [(scenario, check) for scenario, result in found.items() for check in result.bad]
    checks = sum(len(result.good) + len(result.bad) for result in found.values())
    seconds = time.monotonic() - start
    print(f"{column}: {len(found)} scenarios, {checks} checks, {len(failed)} not passed, {seconds:.0f} s", flush=True)
    if kills is not None:
        print(f"    {kills}", flush=True)
        if not kills.count:
            raise RuntimeError("the suite ended before the first kill")
    for scenario, check in failed:
        # The server has no extensions, and the SDK alone no way to do better on three nodes.
        if scenario.version != EXTENSION and column != WITHOUT:
            print(f"    {scenario.version} {scenario.name}: {check.id}: {check.status}: {check.message}")
    return found, kills


def read_known() -> list[Known]:
    entries = json.loads((HOME / "known.json").read_text())
    return [
        Known(entry["scenario"], entry["check"], tuple(entry["versions"]), tuple(entry["columns"]), entry["reason"])
        for entry in entries
    ]


def judge(columns: Mapping[Column, Run]) -> bool:
    """Prints what nonstick does not pass and the SDK does; returns whether all of it is known."""
    known = read_known()
    used: set[Known] = set()
    fine = True
    for column, run in columns.items():
        if column.store is None:
            continue
        for difference in compare(columns[BASELINE], run):
            reasons = [entry for entry in known if entry.covers(str(column), difference)]
            if not reasons:
                fine = False
                print(f"{column} differs from {BASELINE}: {difference}")
            used.update(reasons)
    names = {str(column) for column in columns}
    for entry in known:
        if entry not in used and names.issuperset(entry.columns):
            fine = False
            print(f"known.json is stale: {entry.scenario}: {entry.check} is the same in {', '.join(entry.columns)}")
    return fine


def write(columns: Mapping[Column, Run], killed: Mapping[Column, Kills]) -> None:
    """Puts the table at the end of the report. Columns that did not run stay as they are there."""
    head, mark, tail = REPORT.read_text().partition(MARK)
    if not mark:
        raise RuntimeError(f"{REPORT.name} has no line {MARK}")
    cells: dict[str, Cells] = read_table(tail)
    for column, run in columns.items():
        cells[str(column)] = {scenario: str(result) for scenario, result in run.items()}
    for column, kills in killed.items():
        happened = {"nodes killed": kills.count, "open GET streams broken": kills.streams}
        counted = {Scenario(KILLS, what): str(count) for what, count in happened.items()}
        cells[str(column)] = {**cells[str(column)], **counted}
    order = [str(column) for column in (BASELINE, *COLUMNS)]
    named = {name: cells[name] for name in sorted(cells, key=lambda name: order.index(name) if name in order else 99)}
    REPORT.write_text(f"{head}{MARK}\n\n{table(named, [*VERSIONS, EXTENSION, KILLS])}")


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdk", action="store_true", help="only the SDK's own transport")
    parser.add_argument("--nodes", type=int, choices=(1, 3), help="only the SDK, and nonstick with this many nodes")
    parser.add_argument("--store", choices=get_args(StoreKind), default="sqlite", help="with --nodes (%(default)s)")
    parser.add_argument("--answer", choices=get_args(Answer), default="auto", help="with --nodes (%(default)s)")
    parser.add_argument("--kill-every", type=float, metavar="SECONDS", help="with --nodes 3: kill one after another")
    parser.add_argument("--write", action="store_true", help=f"put what has run into the table in docs/{REPORT.name}")
    arguments = parser.parse_args()
    if arguments.kill_every is not None and (arguments.nodes != 3 or arguments.kill_every <= 0):
        parser.error("--kill-every takes a number of seconds, and --nodes 3")
    try:
        suite = Suite()
    except npm.NpmMissing as missing:
        print(f"skipped: the conformance suite needs npm and Node.js 22: {missing}")
        return 0
    wanted: tuple[Column, ...] = COLUMNS
    if arguments.sdk:
        wanted = (WITHOUT,)
    elif arguments.nodes is not None:
        wanted = (Column(arguments.nodes, arguments.store, arguments.answer, arguments.kill_every),)
    columns: dict[Column, Run] = {}
    killed: dict[Column, Kills] = {}
    for column in (BASELINE, *wanted):
        columns[column], kills = await run_column(suite, column)
        if kills is not None:
            killed[column] = kills
    if arguments.write:
        write(columns, killed)
    return 0 if judge(columns) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
