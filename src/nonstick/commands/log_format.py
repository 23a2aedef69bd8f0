"""Structured logging for `nonstick serve`: one record is one line, as JSON or to be read, and it names the node.

The library itself only ever calls `logging.getLogger(__name__)`; what happens to the records is the host's business.
This module is for the command line, which is the host. What a caller passes as `extra=` becomes fields.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, Final, Literal, TextIO

from nonstick.errors import without_text

__all__ = [
    "LEVELS",
    "Format",
    "JSONFormatter",
    "Lines",
    "TextFormatter",
    "configure",
    "gather",
    "set_node",
    "wants_colour",
]

Format = Literal["text", "json"]

LEVELS: Final = ("debug", "info", "warning", "error")

_QUIET: Final = (
    "mcp.client",
    "mcp.server.sse",
    "mcp.server.streamable_http",
    "mcp.server.streamable_http_manager",
    "sse_starlette",
)
"""Loggers that write session ids or payloads below WARNING, and so never get there (P13)."""

_OTHERS: Final = ("mcp", "fastmcp", "uvicorn", "asyncio")
"""Packages that quote in their logs what clients sent: tools' and resources' names, arguments, exceptions (P13).

Of the first two a record's template is shown, and not what was to be put into it; of all, exceptions without text.
"""

_quoted: Final = json.JSONEncoder(ensure_ascii=False).encode

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
"""Attributes that every record has, or that uvicorn adds for its own colours: not fields."""

_ESCAPED: Final = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    0x0A: "\\n",
    0x0D: "\\r",
    0x09: "\\t",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}

_COLOURS: Final = {"DEBUG": "36", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}


class _Formatter(logging.Formatter):
    """What both formats share: the time, the node's name and the fields of a record."""

    def __init__(self, node: str = "-") -> None:
        super().__init__()
        self.node = node
        self._second = (-1, "")
        """The last second that a record was of, and how it is written."""

    def time(self, created: float) -> str:
        """UTC, ISO 8601, milliseconds."""
        second, whole = self._second
        if second != int(created):
            whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created))
            self._second = (int(created), whole)
        return f"{whole}.{int(created * 1000) % 1000:03d}Z"

    def access(self, created: float, level: str, client: str, method: str, path: str, status: int) -> str:
        """What `format` makes of uvicorn's record of a request that has no fields but its own.

        Args:
            level: The record's `levelname`.
            path: With its query.
        """
        raise NotImplementedError

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """What the caller passed as `extra=`, and the parts of an access line."""
        if _quotes(record):
            return {}
        fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if _is_access(record):
            client, method, path, _, status = record.args  # type: ignore[misc]
            fields |= {"client": client, "method": method, "path": _without_query(str(path)), "status": status}
        return fields

    def text(self, record: logging.LogRecord) -> str:
        """The message. Of an access line the part that is not in its fields."""
        if _quotes(record):
            return str(record.msg)
        return "request" if _is_access(record) else record.getMessage()

    def trace(self, record: logging.LogRecord) -> str:
        """The traceback; "" for a record without an exception."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return ""
        shown = without_text(error) if record.name.partition(".")[0] in _OTHERS else error
        return self.formatException((type(shown), shown, shown.__traceback__))


def _quotes(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in _OTHERS[:2]


def _is_access(record: logging.LogRecord) -> bool:
    return record.name == "uvicorn.access" and isinstance(record.args, tuple) and len(record.args) == 5


def _without_query(path: str) -> str:
    """The path alone: a query can hold a credential (P13)."""
    return path.partition("?")[0]


class JSONFormatter(_Formatter):
    """A record as one JSON object on one line.

    `time`, `level`, `node`, `logger` and `message` are always there; `exception` holds a traceback. A field that has
    one of these names gets an underscore behind it.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.time(record.created),
            "level": record.levelname.lower(),
            "node": self.node,
            "logger": record.name,
            "message": self.text(record),
        }
        if trace := self.trace(record):
            line["exception"] = trace
        for name, value in self.fields(record).items():
            line[f"{name}_" if name in line else name] = value
        return json.dumps(line, default=str, ensure_ascii=False)

    def access(self, created: float, level: str, client: str, method: str, path: str, status: int) -> str:
        return (
            f'{{"time": "{self.time(created)}", "level": {_quoted(level.lower())}, "node": {_quoted(self.node)}, '
            f'"logger": "uvicorn.access", "message": "request", "client": {_quoted(client)}, '
            f'"method": {_quoted(method)}, "path": {_quoted(_without_query(path))}, "status": {status}}}'
        )


class TextFormatter(_Formatter):
    """A record as one line to be read; what has more lines, such as a traceback, follows it, indented.

    Colours the level only.
    """

    def __init__(self, node: str = "-", *, colour: bool = False) -> None:
        super().__init__(node)
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_value(value)}" for name, value in self.fields(record).items())
        # A message may quote what a client sent: it must not be able to begin a line.
        text, *rest = [row.translate(_ESCAPED) for row in self.text(record).rstrip("\n").split("\n")]
        rest += self.trace(record).splitlines()
        line = f"{self.time(record.created)} {self.level(record.levelname)} {self.node} {record.name}: {text}{fields}"
        return line + "".join(f"\n    {row}" for row in rest)

    def access(self, created: float, level: str, client: str, method: str, path: str, status: int) -> str:
        return (
            f"{self.time(created)} {self.level(level)} {self.node} uvicorn.access: request client={_value(client)} "
            f"method={_value(method)} path={_value(_without_query(path))} status={status}"
        )

    def level(self, name: str) -> str:
        """A level's name as lines show it."""
        shown = f"{name:<7}"
        return f"\x1b[{_COLOURS.get(name, '0')}m{shown}\x1b[0m" if self.colour else shown


def _value(value: object) -> str:
    text = str(value)
    if text and text.isprintable() and " " not in text and '"' not in text and "=" not in text:
        return text
    return json.dumps(text, ensure_ascii=False).translate(_ESCAPED)


class Lines(logging.StreamHandler[TextIO]):
    """Our handler: each record is one write of one line, or of one with more below it."""

    @property
    def is_plain(self) -> bool:
        """Whether it shows every record from INFO on, in one of our formats."""
        return not self.filters and self.level <= logging.INFO and isinstance(self.formatter, _Formatter)

    def write_access(self, client: str, method: str, path: str, status: int) -> None:
        """Writes the line of a request, as for uvicorn's record of it; only while this `is_plain`."""
        formatter = self.formatter
        assert isinstance(formatter, _Formatter)
        level = logging.getLevelName(logging.INFO)
        line = formatter.access(time.time(), level, client, method, path, status) + self.terminator
        self.acquire()
        try:
            self.stream.write(line)
            self.stream.flush()
        finally:
            self.release()


def wants_colour(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether to colour: on a terminal, unless `NO_COLOR` is set (https://no-color.org)."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def configure(
    *, style: Format = "text", level: str = "info", node: str = "-", colour: bool = False, stream: TextIO | None = None
) -> None:
    """Sends every record of this process to `stream` (stderr) in this format, in place of what was set up before.

    uvicorn's own loggers are included, so give uvicorn `log_config=None`.
    """
    handler = Lines(stream if stream is not None else sys.stderr)
    handler.setFormatter(JSONFormatter(node) if style == "json" else TextFormatter(node, colour=colour))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    gather()
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def gather() -> None:
    """Has loggers with handlers of their own use ours. FastMCP gives itself some when it is imported."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "fastmcp"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def set_node(node: str) -> None:
    """Has every later record name this node."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, _Formatter):
            handler.formatter.node = node
