"""Lines of the access log are the same on the short way as through `logging`, which they take as soon as it matters."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from nonstick.commands import log_format
from nonstick.commands.access_log import ACCESS, Logged
from nonstick.commands.log_format import Lines

TEMPLATE = '%s - "%s %s HTTP/%s" %d'
MOMENT = 1_700_000_000.1239

REQUESTS = [
    ("127.0.0.1:5", "POST", "/mcp", "1.1", 202),
    ("", "GET", "/", "1.0", 404),
    ("::1:80", "DELETE", "/a%20b?token=secret", "1.1", 500),
    ('x "y"=z', "M\u2028", "/\u00e9\n?", "2", 99),
]


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("", "uvicorn", "uvicorn.access")]
    kept = [(logger, logger.handlers[:], logger.filters[:], logger.level, logger.propagate) for logger in loggers]
    for logger in loggers[1:]:
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)
    yield
    for logger, handlers, filters, level, propagate in kept:
        logger.handlers[:], logger.filters[:], logger.propagate = handlers, filters, propagate
        logger.setLevel(level)


def wanted() -> bool:
    return ACCESS.is_wanted


class Seen(logging.Handler):
    """Keeps every record."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def shown(style: log_format.Format, say: Callable[..., None], *, colour: bool = False) -> str:
    """What this writes of `REQUESTS`."""
    stream = io.StringIO()
    log_format.configure(style=style, node="node-\u00e9 1", colour=colour, stream=stream)
    for request in REQUESTS:
        say(TEMPLATE, *request)
    return stream.getvalue()


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of loggers whose records went through `logging`'s last step, whatever shows them."""
    passed: list[str] = []
    emit = Lines.emit

    def counted(self: Lines, record: logging.LogRecord) -> None:
        passed.append(record.name)
        emit(self, record)

    monkeypatch.setattr(Lines, "emit", counted)
    return passed


@pytest.mark.parametrize(("style", "colour"), [("text", False), ("text", True), ("json", False)])
def test_short_way_writes_same_bytes(
    style: log_format.Format, colour: bool, records: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: MOMENT)
    short = shown(style, ACCESS.info, colour=colour)
    assert not records
    assert short == shown(style, logging.getLogger("uvicorn.access").info, colour=colour)
    assert records == ["uvicorn.access"] * len(REQUESTS)
    assert len(short.splitlines()) >= len(REQUESTS)
    assert "secret" not in short


def test_seconds_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    log_format.configure(style="json", stream=stream)
    for moment in (MOMENT, MOMENT + 0.9, MOMENT - 1):
        monkeypatch.setattr(time, "time", lambda moment=moment: moment)
        ACCESS.info(TEMPLATE, *REQUESTS[0])
    times = [json.loads(line)["time"][17:] for line in stream.getvalue().splitlines()]
    assert times == ["20.123Z", "21.023Z", "19.123Z"]


def _filtered(record: logging.LogRecord) -> bool:
    record.extra = "seen"
    return True


def _on_root() -> None:
    logging.getLogger().addHandler(Seen())


def _on_the_logger() -> None:
    logging.getLogger("uvicorn.access").addHandler(Seen())


def _on_a_parent() -> None:
    logging.getLogger("uvicorn").addHandler(Seen())


def _a_filter() -> None:
    logging.getLogger("uvicorn.access").addFilter(_filtered)


def _a_filter_of_ours() -> None:
    logging.getLogger().handlers[0].addFilter(_filtered)


@pytest.mark.parametrize("put", [_on_root, _on_the_logger, _on_a_parent, _a_filter, _a_filter_of_ours])
def test_who_listens_gets_every_record(put: Callable[[], None], records: list[str]) -> None:
    stream = io.StringIO()
    log_format.configure(style="json", stream=stream)
    put()
    ACCESS.info(TEMPLATE, *REQUESTS[0])
    assert records == ["uvicorn.access"]
    line = json.loads(stream.getvalue())
    assert (line["path"], line["status"]) == ("/mcp", 202)
    if put in (_a_filter, _a_filter_of_ours):
        assert line["extra"] == "seen"
    else:
        owner = {_on_root: "", _on_the_logger: "uvicorn.access", _on_a_parent: "uvicorn"}[put]
        [seen] = [handler for handler in logging.getLogger(owner).handlers if isinstance(handler, Seen)]
        assert [(record.args, record.funcName) for record in seen.records] == [
            (REQUESTS[0], "test_who_listens_gets_every_record")
        ]


def test_handler_in_our_place_hears() -> None:
    log_format.configure(stream=io.StringIO())
    seen = Seen()
    logging.getLogger().handlers[:] = [seen]
    ACCESS.info(TEMPLATE, *REQUESTS[0])
    assert [record.getMessage() for record in seen.records] == ['127.0.0.1:5 - "POST /mcp HTTP/1.1" 202']


def test_other_formatter_is_used(records: list[str]) -> None:
    stream = io.StringIO()
    log_format.configure(stream=stream)
    logging.getLogger().handlers[0].setFormatter(logging.Formatter("mine: %(message)s"))
    ACCESS.info(TEMPLATE, *REQUESTS[0])
    assert stream.getvalue() == 'mine: 127.0.0.1:5 - "POST /mcp HTTP/1.1" 202\n'


def test_record_factory_is_asked(records: list[str]) -> None:
    stream = io.StringIO()
    log_format.configure(style="json", stream=stream)
    before = logging.getLogRecordFactory()

    def make(*args: Any, **more: Any) -> logging.LogRecord:
        record = before(*args, **more)
        record.trace = "t1"
        return record

    logging.setLogRecordFactory(make)
    try:
        ACCESS.info(TEMPLATE, *REQUESTS[0])
    finally:
        logging.setLogRecordFactory(before)
    assert json.loads(stream.getvalue())["trace"] == "t1"


@pytest.mark.parametrize("step", ["makeRecord", "handle", "callHandlers"])
def test_patched_logging_is_passed(step: str, records: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Error trackers do so."""
    log_format.configure(stream=io.StringIO())
    original = getattr(logging.Logger, step)
    passed: list[str] = []

    def patched(self: logging.Logger, *args: Any, **more: Any) -> Any:
        passed.append(self.name)
        return original(self, *args, **more)

    monkeypatch.setattr(logging.Logger, step, patched)
    ACCESS.info(TEMPLATE, *REQUESTS[0])
    assert passed == records == ["uvicorn.access"]


def test_unwanted_lines_are_not_written(records: list[str]) -> None:
    """Nor made: uvicorn is told so, for each request."""
    stream = io.StringIO()
    log_format.configure(level="warning", stream=stream)
    assert not wanted()
    ACCESS.info(TEMPLATE, *REQUESTS[0])
    logging.getLogger().setLevel(logging.INFO)
    assert wanted()
    logging.disable(logging.INFO)
    try:
        assert not wanted()
        ACCESS.info(TEMPLATE, *REQUESTS[0])
    finally:
        logging.disable(logging.NOTSET)
    logging.getLogger("uvicorn.access").propagate = False
    ACCESS.info(TEMPLATE, *REQUESTS[0])
    assert stream.getvalue() == ""
    assert not records


def test_line_that_fails_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """As `logging` does: and the request goes on."""
    stream = io.StringIO()
    log_format.configure(stream=stream)
    stream.close()
    ACCESS.info(TEMPLATE, *REQUESTS[0])
    assert "--- Logging error ---" in capsys.readouterr().err


@pytest.mark.anyio
async def test_uvicorn_says_each_request_once(records: list[str]) -> None:
    """Also one that its own answer ends. The level may change while a connection lasts."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/broken":
            raise ValueError("broken")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    stream = io.StringIO()
    log_format.configure(style="json", stream=stream)
    config = uvicorn.Config(app, http=Logged, interface="asgi3", lifespan="off", log_config=None)
    config.load()
    state = uvicorn.Server(config).server_state
    server = await asyncio.get_running_loop().create_server(
        lambda: Logged(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])

    async def ask(path: str) -> None:
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        async with asyncio.timeout(60):
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(21 if path == "/broken" else 2)

    await ask("/one?token=secret")
    logging.getLogger().setLevel(logging.WARNING)
    await ask("/two")
    logging.getLogger().setLevel(logging.INFO)
    await ask("/broken")
    writer.close()
    server.close()
    await server.wait_closed()
    lines = [line for line in map(json.loads, stream.getvalue().splitlines()) if line["logger"] == "uvicorn.access"]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("GET", "/one", 200),
        ("GET", "/broken", 500),
    ]
    assert "uvicorn.access" not in records
