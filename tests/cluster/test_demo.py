"""`nonstick demo` as a process: it passes, tells who served what, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nonstick.testing.servers.valkey import ValkeyServer

DEADLINE = 240.0

COMMAND = [sys.executable, "-m", "nonstick", "demo"]


def demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def lines_of(story: str, what: str) -> list[str]:
    """The told exchanges of this kind."""
    return [line for line in story.splitlines() if re.match(rf"   {re.escape(what)} +-> node-[a-i]", line)]


def nodes_of(story: str, what: str) -> set[str]:
    return {match[1] for line in lines_of(story, what) if (match := re.search(r"-> (node-[a-i])", line))}


def acts_of(story: str) -> list[str]:
    return re.split(r"^\d\. ", story, flags=re.MULTILINE)[1:]


def assert_it_passed(ended: subprocess.CompletedProcess[str]) -> None:
    story = ended.stdout
    assert ended.returncode == 0, story + ended.stderr
    assert "PASS" in story.splitlines()[-1]
    assert ended.stderr == ""
    # The session went through every kind of request, and through every node.
    for what, status in {
        "initialize": "200 json",
        "notifications/initialized": "202",
        "GET (stream)": "200 sse",
        "tools/list": "200 json",
        "tools/call where": "200 json",
        "tools/call count": "200 sse",
        "GET (rest of a call)": "200 sse",
        "tools/call paint": "200 sse",
        "reply": "202",
        "DELETE": "200",
    }.items():
        assert lines_of(story, what), f"{what} is missing in:\n{story}"
        assert all(f" {status}" in line for line in lines_of(story, what)), story
    assert " 404 " in lines_of(story, "ping")[0]
    everywhere, opener_killed, cut_off, asked = acts_of(story)
    assert nodes_of(everywhere, "tools/call where") == {"node-a", "node-b", "node-c"}
    for step in range(1, 5):
        assert f"progress {step} of 4" in everywhere
        assert f"progress {step} of 4" in opener_killed
    assert_the_session_outlived_its_opener(opener_killed)
    assert_calls_were_cut_off(cut_off)
    assert nodes_of(asked, "reply").isdisjoint(nodes_of(asked, "tools/call paint"))
    assert re.search(r'"node-[abc] was told teal"', asked)


def assert_the_session_outlived_its_opener(act: str) -> None:
    before, after = act.split("*  kill -9 ")
    survivors = {"node-a", "node-b", "node-c"} - {after[:6]}
    assert nodes_of(before, "initialize") == {after[:6]}
    assert nodes_of(after, "tools/call where") == survivors
    assert nodes_of(after, "DELETE") <= survivors


def assert_calls_were_cut_off(act: str) -> None:
    cut, killed = act.split("*  kill -9 ")
    # The connection was cut: each step once, in order, the rest of them through another node.
    cut, second_call = cut.split("each of the 16 steps came once, in order")
    steps = re.findall(r"progress (\d+) of 16: \1 on (node-.), read through (node-.)", cut)
    assert [int(step) for step, _, _ in steps] == list(range(1, 17))
    (runner,) = nodes_of(cut, "tools/call count")
    assert {ran for _, ran, _ in steps} == {runner}
    assert {through for _, _, through in steps} == {runner} | nodes_of(cut, "GET (rest of a call)")
    assert runner not in nodes_of(cut, "GET (rest of a call)")
    # The node was killed: one error, through another node, and the session goes on.
    assert nodes_of(second_call, "tools/call count") == {killed[:6]}
    assert nodes_of(killed, "GET (rest of a call)")
    assert killed.count("The server node that ran this request was lost before it finished") == 1
    assert nodes_of(killed, "tools/call where")
    assert killed[:6] not in nodes_of(killed, "tools/call where") | nodes_of(killed, "DELETE")


def test_demo_passes_on_sqlite() -> None:
    """P1, P2, P3, P4, P6, P7."""
    assert_it_passed(demo())


@pytest.mark.slow
def test_demo_passes_on_valkey() -> None:
    """P1, P2, P3, P4, P6, P7. The store is the one that was named."""
    with ValkeyServer() as valkey:
        ended = demo("--store", valkey.url)
        assert_it_passed(ended)
        assert f"they share {valkey.url}" in ended.stdout


@pytest.mark.slow
def test_two_nodes_are_enough() -> None:
    """P1, P3, P4, P7."""
    ended = demo("--nodes", "2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(acts_of(ended.stdout)) == 4


@pytest.mark.slow
def test_sdk_alone_fails_as_expected() -> None:
    ended = demo("--sdk")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " 404 " in lines_of(ended.stdout, "notifications/initialized")[0]
    assert "the client gives up: MCPError: Session not found" in ended.stdout
    assert re.search(r"PASS  failed as it must without nonstick: \d of \d+ requests got 404", ended.stdout)


@pytest.mark.slow
def test_unwatched_output_is_plain() -> None:
    assert "\x1b" not in demo("--sdk", NO_COLOR="1").stdout


@pytest.mark.slow
def test_failed_node_shows_its_last_lines(tmp_path: Path) -> None:
    ended = demo("--store", f"sqlite:///{tmp_path}/absent/x.db")
    assert ended.returncode == 1
    assert "FAIL  node-a ended at its start" in ended.stdout
    assert "| nonstick: the store cannot be used:" in ended.stdout


def test_unknown_store_is_refused_first() -> None:
    """Before anything starts."""
    ended = demo("--store", "mysql://x")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("nonstick: the store URL")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_no_node_behind(signum: signal.Signals) -> None:
    process = subprocess.Popen(COMMAND, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "initialize " in line:
                break
        children = children_of(process.pid)
        assert len(children) == 3
        process.send_signal(signum)
        rest = process.stdout.read()
        assert process.wait(DEADLINE) == 130
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert "interrupted; the nodes are stopped" in rest
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
