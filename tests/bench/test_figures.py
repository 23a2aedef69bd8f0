"""Ratios are taken within a round, turns come in another order each round, and arrivals do not wait for answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bench.budgets import budgets, limit_of, ratio_of
from bench.figures import paired, share_of
from bench.opponents import OPPONENTS
from bench.report import tables
from bench.requests import order
from bench.stage import Stage

from bench import __main__ as main
from bench import arrivals, many


def test_slow_round_leaves_ratio_untouched() -> None:
    """The medians, 30 and 10, would make 3."""
    ours, theirs = [20.0, 60.0, 30.0, 200.0, 18.0], [10.0, 30.0, 15.0, 100.0, 9.0]
    assert paired(ours, theirs) == 2.0
    assert paired([1.0, 30.0, 40.0], [10.0, 10.0, 10.0]) == 3.0


def test_lines_of_other_rounds_lack_ratios() -> None:
    with pytest.raises(ValueError, match="longer"):
        paired([1.0], [1.0, 2.0])


def test_percentile_is_one_of_the_values() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert [share_of(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert share_of([7.0], 0.5) == 7.0


def test_rounds_give_everybody_one_shuffled_turn() -> None:
    """Neighbours change from round to round."""
    rounds = [order(6, number) for number in range(40)]
    assert all(sorted(one) == list(range(6)) for one in rounds)
    assert rounds == [order(6, number) for number in range(40)], "a run can be made again"
    neighbours = {(first, second) for one in rounds for first, second in pairwise(one)}
    assert len(neighbours) == 6 * 5, "each follows each at some time"


def test_the_limit_has_as_many_nodes() -> None:
    assert limit_of("nonstick valkey, 1 node") == "bare ASGI, one read"
    assert limit_of("nonstick valkey, 3 nodes, low-level") == "bare ASGI, one read, 3 nodes"
    for name, opponent in OPPONENTS.items():
        assert OPPONENTS[limit_of(name)].nodes == opponent.nodes


def test_arrivals_are_due_at_even_distances() -> None:
    assert list(arrivals.schedule(4, 1.0)) == [0.0, 0.25, 0.5, 0.75]
    assert len(list(arrivals.schedule(1000, 2.5))) == 2500


def test_all_idle_sessions_are_opened() -> None:
    for sessions in (8, 1003, 100_000):
        assert sum(many.shares(sessions)) == sessions
        assert len(many.shares(sessions)) == many.SAMPLES


TAKES = 0.02
"""Seconds that the slow server needs for a session, one after the other."""


@asynccontextmanager
async def _slow_server() -> AsyncIterator[int]:
    """Its port."""
    one_at_once = asyncio.Lock()
    serving: list[asyncio.Task[Any] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        with closing(writer), suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
                if b'"initialize"' in await reader.readexactly(size):
                    async with one_at_once:
                        await asyncio.sleep(TAKES)
                writer.write(b"HTTP/1.1 200 OK\r\nmcp-session-id: one\r\ncontent-length: 0\r\n\r\n")

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.gather(*filter(None, serving))


@pytest.mark.anyio
async def test_arrivals_are_timed_from_due_time(tmp_path: Path) -> None:
    """A server that is slower than the arrivals makes those wait that come later, for a connection, and that counts."""
    stage = Stage(OPPONENTS["mcp, in memory"], "", tmp_path, "")
    async with _slow_server() as port:
        stage.ports = [port]
        step = await arrivals.step(stage, 200, 0.2, connections=4)
    assert step.arrivals == 40
    assert not step.errors
    assert not step.sustained
    assert step.achieved <= 1 / TAKES
    # The last was due after 0.2 s, and is served as the fortieth.
    assert step.p99_ms >= 1e3 * (40 * TAKES - 0.2)


def _line(name: str, *cpu: float) -> dict[str, Any]:
    figures = {"requests": 1, "cpu_us": cpu[0], "p50_ms": 1.0, "p99_ms": 2.0, "rate": 1.0}
    return {"workload": "echo, 16 connections", "name": name, "cpu_us_rounds": list(cpu), **figures}


def _results(*lines: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {"date": "a day", "code": "a commit", "command": "a command", "seconds": 61.0}
    about |= {"load_before": 0.0, "load_after": 0.0}
    environment = {"cpu": "a CPU", "cores": 2, "system": "a system", "python": "3", "versions": {"mcp": "2"}}
    return {"environment": environment, "parts": {"requests": about}, "requests": list(lines)}


def test_one_part_yields_tables_and_budgets() -> None:
    results = _results(
        _line("bare ASGI, one read", 10, 20),
        _line("bare ASGI, one read, 3 nodes", 20, 40),
        _line("nonstick valkey, 1 node", 15, 30),
        _line("nonstick valkey, 3 nodes", 50, 100),
    )
    assert ratio_of(results, "echo, 16 connections", "nonstick valkey, 3 nodes", "nobody") is None
    ratios = {one.what: (one.value, one.met) for one in budgets(results) if "ratio to bare" in one.what}
    assert ratios == {
        "echo on Valkey, 1 node: CPU, ratio to bare ASGI, one read": (1.5, True),
        "echo on Valkey, 3 nodes: CPU, ratio to bare ASGI, one read, 3 nodes": (2.5, False),
    }
    text = tables(results)
    assert "### echo, 16 connections" in text
    assert "1:01" in text
    assert "Idle sessions" not in text


def test_serve_cost_is_in_limits() -> None:
    """Inside each round, as all ratios: the medians, 60 and 20 to 30, would make 1.33."""
    results = _results(
        _line("bare ASGI, one read", 10, 30, 100),
        _line("nonstick valkey, 1 node", 20, 20, 200),
        _line("nonstick serve valkey, 1 node", 60, 23, 230),
    )
    [serve] = [one for one in budgets(results) if one.what.startswith("nonstick serve")]
    assert serve.value == pytest.approx(0.3)
    assert not serve.met
    del results["requests"][0]
    assert not budgets(results)[1:], "only the ratio of p99 to p50 is left"


def test_only_enough_streams_have_cpu_budget() -> None:
    streams = {"streams": 500, "bytes_per_stream": 23 * 1024, "idle_cores": 0.2}
    assert [one.met for one in budgets({"streams": streams})] == [True]
    assert [one.met for one in budgets({"streams": {**streams, "streams": 10_000}})] == [True, False]


def test_delivery_and_reply_have_own_limits() -> None:
    lines = [{"store": "valkey", "what": what, "p50": 1.0, "p99": 2.0} for what in ("delivery", "reply", "cancel")]
    found = {one.what: one.met for one in budgets({"latency": lines}) if one.what.endswith("p50")}
    assert found == {"delivery on another node, valkey: p50": False, "reply on another node, valkey: p50": True}


def _among(sessions: int, **other: float) -> dict[str, Any]:
    figures: dict[str, Any] = {"sessions": sessions, "store_bytes_per_session": 700.0, "node_bytes": 2**28}
    figures |= {
        "store_data_bytes_per_session": 600.0,
        "cpu_us": 400.0,
        "round_trips": 1.0,
        "calls": 300,
        "instructions": 6000,
    }
    return {**figures, **other}


@pytest.mark.parametrize(
    ("grown", "missed"),
    [
        ({}, []),
        ({"store_bytes_per_session": 800.0}, ["in the store"]),
        ({"node_bytes": 2**28 + 10_000_000}, ["the nodes' memory"]),
        ({"round_trips": 1.03}, ["store round trips"]),
        ({"calls": 310}, ["functions called"]),
        ({"instructions": 6200}, ["instructions per echo"]),
    ],
    ids=lambda value: " ".join(value) or "flat",
)
def test_million_sessions_must_be_flat(grown: dict[str, float], missed: list[str]) -> None:
    results = {"million": [{"store": "valkey", "among": [_among(100_000), _among(1_000_000, **grown)]}]}
    told = [one.what.partition(": ")[2] for one in budgets(results) if not one.met]
    assert len(told) == len(missed)
    assert all(what.startswith(start) for what, start in zip(told, missed, strict=True))
    assert "### A million sessions" in tables({**_results(), **results})


def test_instructions_are_told_in_limits() -> None:
    text = tables({**_results(), "instructions": {"the limit": 400.0, "echo": 800.0}})
    assert "| echo      |              800 |         2.00 |" in text


def test_failed_part_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the run does not end well."""

    async def fail(_: main.Size, __: main.Tell) -> None:
        raise RuntimeError("a store did not start")

    async def count(_: main.Size, __: main.Tell) -> dict[str, float]:
        return {"the limit": 400.0}

    parts = {"million": main.Part(fail, lambda _: 1), "instructions": main.Part(count, lambda _: 1)}
    monkeypatch.setattr(main, "PARTS", parts)
    file = tmp_path / "results.json"
    monkeypatch.setattr("sys.argv", ["bench", "--output", str(file)])
    with pytest.raises(SystemExit, match="--only: million"):
        main.main()
    assert json.loads(file.read_text())["instructions"] == {"the limit": 400.0}
    assert "a store did not start" in capsys.readouterr().err


def test_rerun_part_replaces_only_itself(tmp_path: Path) -> None:
    file, results = tmp_path / "results.json", _results(_line("bare ASGI", 10))
    environment = results["environment"]
    assert main.kept(file, environment, ["latency"]) == {"environment": environment, "parts": {}}
    file.write_text(json.dumps(results))
    assert main.kept(file, environment, ["latency"]) == results
    assert main.kept(file, environment, ["requests"]) == {"environment": environment, "parts": {}}
    with pytest.raises(ValueError, match="another machine or with other versions"):
        main.kept(file, {**environment, "python": "4"}, ["latency"])
