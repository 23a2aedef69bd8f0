"""The command line: `nonstick serve` and `nonstick demo`.

Exit status: 0 when all went well, 1 when something failed on the way (also a demo that did not pass), 2 when what was
asked for cannot work; then one paragraph on stderr says what to do.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from nonstick import logs
from nonstick.errors import ConfigurationError, StoreUnavailable

__all__ = ["main"]

_TOP = """\
examples:
  nonstick serve server.py                              one process, an SQLite file, port 8000
  nonstick serve server.py --workers 4                  four processes, any of which serves any session
  nonstick serve shop.tools:mcp --store redis://cache   a node of a cluster: start as many as you like
  nonstick demo                                         see it work: three nodes, no affinity, kill -9
"""

_SERVE = """\
TARGET is one of
  path/to/file.py:name      a file, and what it holds under that name
  package.module:name       a module, looked for in the working directory first
and `:name` may be left out if there is one server, or one called mcp, server or app. What stands there is an
MCPServer, a low-level Server, or a function without arguments, sync or async, that returns one.

besides the MCP endpoint there are
  /healthz   200 while the process is up
  /readyz    200 while the store can be reached and the node is not draining, else 503 with the reason

environment:
  NONSTICK_STORE   the store, if --store is not given (keeps a password out of the list of processes)
  NONSTICK_ENCRYPTION_KEYS
                   keys, with commas between them, to encrypt what the store keeps; the first one encrypts
  NONSTICK_NODE    the name of this node in logs and in the store; the host's name if not set

examples:
  nonstick serve server.py
  nonstick serve shop.tools:mcp --store redis://cache:6379 --host 0.0.0.0 --log-format json
  nonstick serve shop/tools.py:make_server --workers 4 --port 9000
"""

_DEMO = """\
examples:
  nonstick demo
  nonstick demo --store redis://127.0.0.1:6379     the same over Redis or Valkey
  nonstick demo --sdk                              what happens without nonstick
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        status: int = options.run(options)
    except (ConfigurationError, StoreUnavailable) as error:
        return _refuse(str(error), getattr(error, "trace", ""))
    except KeyboardInterrupt:
        return 130
    return status


def _refuse(message: str, trace: str = "") -> int:
    if trace:
        print(trace.rstrip(), file=sys.stderr)
    print(f"nonstick: {message}", file=sys.stderr)
    return 2


def _serve(options: argparse.Namespace) -> int:
    from nonstick import serving  # here, because `--help` needs no web server

    fields = {name: value for name, value in vars(options).items() if name in serving.Settings.__dataclass_fields__}
    fields["store"] = options.store or os.environ.get("NONSTICK_STORE") or serving.DEFAULT_STORE
    return serving.serve(serving.Settings(**fields))


def _demo(options: argparse.Namespace) -> int:
    from nonstick import demo

    return demo.run(store=options.store, sdk=options.sdk, nodes=options.nodes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nonstick",
        description="Any replica of an MCP server serves any session.",
        epilog=_TOP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nonstick {version('nonstick')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_demo(commands)
    return parser


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve an MCP server as a node of a cluster",
        description="Serves an MCP server over Streamable HTTP, with its sessions in a store.",
        epilog=_SERVE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", help="the server: path/to/file.py:name or package.module:name")
    parser.add_argument(
        "--store",
        metavar="URL",
        help="where sessions live: sqlite:///FILE (processes of one machine), redis://HOST:PORT/DB, or memory: "
        "(this process only). Default: $NONSTICK_STORE, else sqlite:///.nonstick/sessions.db",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on. On a loopback address only local Host and Origin headers are accepted "
        "(protection against DNS rebinding); 0.0.0.0 is every address of this machine. Default: %(default)s",
    )
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on, 0 for any. Default: %(default)s")
    parser.add_argument("--path", type=_path, default="/mcp", help="path of the MCP endpoint. Default: %(default)s")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--workers", type=_count, default=1, metavar="N", help="processes to run. Default: 1")
    how.add_argument("--reload", action="store_true", help="start again whenever a Python file changes")
    parser.add_argument(
        "--answer",
        choices=("auto", "sse", "json"),
        default="auto",
        help="how a request is answered: auto is JSON, or a stream if the handler sends something first or takes "
        "longer; sse is always a stream; json is never one. Default: %(default)s",
    )
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=20.0,
        metavar="SECONDS",
        help="how long a stop (SIGTERM) waits for what runs. Default: 20",
    )
    parser.add_argument(
        "--lease",
        type=_lease,
        default=12.0,
        metavar="SECONDS",
        help="how long a node that is not heard of counts as alive; after that, and a few seconds, whoever waits for "
        "a request that it ran gets an error. Default: 12",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="one line per record either way, on stderr. Default: %(default)s",
    )
    parser.add_argument("--log-level", choices=logs.LEVELS, default="info", help="Default: %(default)s")
    parser.set_defaults(run=_serve)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="show a session that moves between nodes",
        description="Starts nodes that share a store, a proxy that sends every request to another one, and the "
        "official Python client; says who served what; kills nodes and cuts connections in the middle of it.",
        epilog=_DEMO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--store", metavar="URL", help="the store to share. Default: a temporary SQLite file")
    parser.add_argument("--nodes", type=_nodes, default=3, metavar="N", help="how many nodes, 2 to 9. Default: 3")
    parser.add_argument("--sdk", action="store_true", help="serve with the SDK alone instead, and see it fail")
    parser.set_defaults(run=_demo)


def _number(text: str, low: float, high: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def _port(text: str) -> int:
    return int(_number(text, 0, 65535, "a port (0 to 65535)"))


def _count(text: str) -> int:
    return int(_number(text, 1, 1000, "a number of processes (1 or more)"))


def _nodes(text: str) -> int:
    return int(_number(text, 2, 9, "a number of nodes (2 to 9)"))


def _seconds(text: str) -> float:
    return _number(text, 0, 86_400, "a number of seconds (0 to 86400)")


def _lease(text: str) -> float:
    return _number(text, 1, 86_400, "a number of seconds (1 to 86400)")


def _path(text: str) -> str:
    if not text.startswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r} does not start with a slash")
    return text


if __name__ == "__main__":
    sys.exit(main())
