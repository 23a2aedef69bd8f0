"""A record is one line, names the node, and carries no query string (P13)."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from nonstick.commands import log_format


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root, access = logging.getLogger(), logging.getLogger("uvicorn.access")
    kept = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in (root, access)]
    # uvicorn, run by a test before, sets up its own.
    access.handlers, access.propagate = [], True
    access.setLevel(logging.NOTSET)
    yield
    for logger, handlers, level, propagate in kept:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def json_line(stream: io.StringIO) -> dict[str, Any]:
    (line,) = stream.getvalue().splitlines()
    parsed: dict[str, Any] = json.loads(line)
    return parsed


def test_json_record_is_one_line() -> None:
    """With the node and the extra fields."""
    stream = io.StringIO()
    log_format.configure(style="json", node="node-a", stream=stream)
    logging.getLogger("nonstick.http.manager").info("session\nopened", extra={"session": "ab12", "took": 0.5})
    line = json_line(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "node": "node-a",
        "logger": "nonstick.http.manager",
        "message": "session\nopened",
        "session": "ab12",
        "took": 0.5,
    }


def test_json_record_holds_its_traceback() -> None:
    stream = io.StringIO()
    log_format.configure(style="json", stream=stream)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("nonstick").exception("it broke")
    assert "ValueError: boom" in json_line(stream)["exception"]


def test_extra_field_replaces_no_standard_field() -> None:
    stream = io.StringIO()
    log_format.configure(style="json", node="node-a", stream=stream)
    logging.getLogger("nonstick").info("hello", extra={"node": "impostor"})
    line = json_line(stream)
    assert (line["node"], line["node_"]) == ("node-a", "impostor")


def test_json_record_takes_unserialisable_values() -> None:
    stream = io.StringIO()
    log_format.configure(style="json", stream=stream)
    logging.getLogger("nonstick").info("hello", extra={"kinds": {1}})
    assert json_line(stream)["kinds"] == "{1}"


def test_text_message_cannot_begin_a_line() -> None:
    """What a client sent may be quoted in a message."""
    stream = io.StringIO()
    log_format.configure(stream=stream)
    logging.getLogger("nonstick").warning("bad host %s", "x\n2026 ERROR forged\r\x1b[2J\u2028", extra={"n": 1})
    first, second = stream.getvalue().splitlines()
    assert first.endswith("bad host x n=1")
    assert second == "    2026 ERROR forged\\r\\x1b[2J\\u2028"


def test_text_record_quotes_where_needed() -> None:
    stream = io.StringIO()
    log_format.configure(node="node-a", stream=stream)
    logging.getLogger("nonstick").info("ready", extra={"store": "sqlite:///x.db", "why": 'a "b"\nc'})
    assert stream.getvalue().endswith('node-a nonstick: ready store=sqlite:///x.db why="a \\"b\\"\\nc"\n')


def test_access_record_drops_the_query() -> None:
    """P13: a query string can hold a credential."""
    stream = io.StringIO()
    log_format.configure(style="json", stream=stream)
    access = logging.getLogger("uvicorn.access")
    access.info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:5", "POST", "/mcp?access_token=secret", "1.1", 202)
    line = json_line(stream)
    assert (line["method"], line["path"], line["status"], line["client"]) == ("POST", "/mcp", 202, "127.0.0.1:5")
    assert "secret" not in stream.getvalue()


@pytest.mark.parametrize("style", ["text", "json"])
def test_late_node_name_can_be_set(style: log_format.Format) -> None:
    stream = io.StringIO()
    log_format.configure(style=style, stream=stream)
    log_format.set_node("node-b-7")
    logging.getLogger("nonstick").info("ready")
    assert "node-b-7" in stream.getvalue()


def test_records_below_the_level_are_dropped() -> None:
    stream = io.StringIO()
    log_format.configure(level="warning", stream=stream)
    logging.getLogger("nonstick").info("quiet")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    "name", ["mcp.client.streamable_http", "mcp.server.streamable_http_manager", "mcp.server.sse", "sse_starlette.sse"]
)
def test_secretive_loggers_stay_silent_at_debug(name: str) -> None:
    """P13."""
    stream = io.StringIO()
    log_format.configure(level="debug", stream=stream)
    logging.getLogger(name).info("Received session ID: secret")
    assert stream.getvalue() == ""
    logging.getLogger(name).warning("trouble")
    assert "trouble" in stream.getvalue()


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_only() -> None:
    """`NO_COLOR` wins even there."""
    assert log_format.wants_colour(_Terminal(), {})
    assert not log_format.wants_colour(_Terminal(), {"NO_COLOR": "1"})
    assert not log_format.wants_colour(io.StringIO(), {})


def test_text_record_is_coloured_on_request() -> None:
    record = logging.LogRecord("nonstick", logging.INFO, __file__, 1, "hi", None, None)
    assert "\x1b[32mINFO" in log_format.TextFormatter("n", colour=True).format(record)
    assert "\x1b" not in log_format.TextFormatter("n").format(record)


def test_text_traceback_is_indented_below_record() -> None:
    try:
        raise ValueError("boom")
    except ValueError:
        record = logging.LogRecord("nonstick", logging.ERROR, __file__, 1, "broke", None, sys.exc_info())
    first, *rest = log_format.TextFormatter("n").format(record).splitlines()
    assert first.endswith("broke")
    assert rest
    assert all(row.startswith("    ") for row in rest)
