"""The command line: `nonstick serve`, `nonstick doctor`, `nonstick migrate` and `nonstick demo`.

Exit status: 0 when all went well, 1 when something failed on the way (also a demo that did not pass, or a store that
the doctor found an error in), 2 when what was asked for cannot work; then one paragraph on stderr says what to do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any, Final, get_args

from nonstick.app import app
from nonstick.commands import doctor, log_format, migrate
from nonstick.commands.serve_options import DEFAULT_STORE, ServeOptions
from nonstick.core.settings import Answer, Placement, Settings, arguments_of, said_as
from nonstick.errors import ConfigurationError, StoreUnavailable, close_to
from nonstick.stores import open_store
from nonstick.stores.common.upkeep import Finding

__all__ = ["main"]

_TOP = """\
examples:
  nonstick serve server.py                              one process, an SQLite file, port 8000
  nonstick serve server.py --workers 4                  four processes, any of which serves any session
  nonstick serve shop.tools:mcp --store redis://cache   a node of a cluster: start as many as you like
  nonstick doctor --store redis://cache                 is this store all right, how fast is it, what is to be done
  nonstick migrate --store postgresql://db/app          make or upgrade the tables of a store that has some
  nonstick demo                                         see it work: three nodes, no affinity, kill -9
"""

_SERVE = """\
TARGET is one of
  path/to/file.py:name      a file, and what it holds under that name
  package.module:name       a module, looked for in the working directory first
and `:name` may be left out if there is one server, or one called mcp, server or app. What stands there is an
MCPServer, a low-level Server, a FastMCP server, a Starlette or FastAPI app that has one in it, or a function without
arguments, sync or async, that returns one of these.

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

_DOCTOR = """\
It looks at the server behind the store (version, role, eviction or durability, clock, permissions, tables), then acts
as two nodes that share a session: how long a load and an append take, whether one sees what the other writes, whether
and how soon it is woken, whether a lease holds and lapses. What it writes it removes again, and it makes no tables.

With TARGET it also says whether that server was built with what clients of 2026-07-28 need shared between nodes.

exit status: 0 nothing worse than a warning, 1 at least one error, 2 it was asked for something that cannot work

environment:
  NONSTICK_STORE   the store, if --store is not given (keeps a password out of the list of processes)

examples:
  nonstick doctor --store redis://cache:6379
  nonstick doctor --store postgresql://app@db/app server:mcp
  nonstick doctor --store rediss://cache --json | jq '.findings[] | select(.level != "ok")'
"""

_MIGRATE = """\
PostgreSQL and SQLite stores have tables with a version. The first node of a release makes or upgrades them by itself,
unless the URL says migrate=false: then it refuses to start until this command was run. Nodes of the last release go on
working meanwhile and afterwards. Redis and Valkey have nothing to migrate.

environment:
  NONSTICK_STORE   the store, if --store is not given (keeps a password out of the list of processes)

examples:
  nonstick migrate --store postgresql://owner@db/app
  nonstick migrate --store postgresql://owner@db/app --dry-run             what would be done
  nonstick migrate --store postgresql://owner@db/app --print-sql | less    for whoever runs SQL on that server
"""
_OPTIONS: Final = {
    field.name: f"--{field.name.replace('_', '-')}"
    for field in fields(ServeOptions)
    if field.name not in ("target", "settings")
}
"""Of `nonstick serve`, by their names in `ServeOptions`. `--set` takes what they do not."""

_DEMO = """\
examples:
  nonstick demo
  nonstick demo --store redis://127.0.0.1:6379     the same over Redis or Valkey
  nonstick demo --sdk                              what happens without nonstick
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options, unknown = _parser().parse_known_args(argv)
    try:
        if unknown:
            raise ConfigurationError(_no_such_option(unknown[0], serves=options.run is _serve))
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


def _no_such_option(text: str, *, serves: bool) -> str:
    """What to say of an argument that the command does not take; `serves` for `nonstick serve`."""
    flag, _, _ = text.partition("=")
    name = flag.lstrip("-").replace("-", "_")
    known = arguments_of(app) if serves else []
    if name in known:
        return f"{flag} is given as --set {name}=VALUE"
    meant = close_to(name, [*_OPTIONS, *known]) if serves else None
    hint = (
        f": did you mean {_OPTIONS.get(meant, f'--set {meant}=VALUE')}?"
        if meant
        else "; --help lists those that there are"
    )
    return f"there is no option {flag}{hint}"


def _serve(options: argparse.Namespace) -> int:
    from nonstick.commands import serve  # here, because `--help` needs no web server

    given = {name: getattr(options, name) for name in _OPTIONS}
    given["store"] = _named_store(options) or DEFAULT_STORE
    return serve.serve(ServeOptions(target=options.target, settings=dict(options.settings), **given))


def _doctor(options: argparse.Namespace) -> int:
    url = _store_url(options)
    logger = logging.getLogger("nonstick")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what it would say of the store there is said by the findings
    try:
        findings = asyncio.run(_diagnosed(url, options.target))
    finally:
        logger.setLevel(level)
    print(doctor.as_json(findings) if options.json else doctor.as_text(findings))
    return 1 if doctor.failed(findings) else 0


async def _diagnosed(url: str, target: str | None) -> list[Finding]:
    server = await doctor.look_at_server(target) if target is not None else []
    return await doctor.diagnose(lambda: open_store(url), alone=url.lower().startswith("memory:")) + server


def _migrate(options: argparse.Namespace) -> int:
    store = open_store(_store_url(options))
    asyncio.run(migrate.run(store, say=print, dry_run=options.dry_run, print_sql=options.print_sql))
    return 0


def _store_url(options: argparse.Namespace) -> str:
    url = _named_store(options)
    if url is None:
        raise ConfigurationError("name the store with --store URL, or in NONSTICK_STORE.")
    return url


def _named_store(options: argparse.Namespace) -> str | None:
    """The store that was named; None if none was.

    Raises:
        ConfigurationError: It is named, and empty: a secret that was not filled in must not become a file of its own.
    """
    given: str | None = options.store
    url = os.environ.get("NONSTICK_STORE") if given is None else given
    if url is not None and not url.strip():
        where = "NONSTICK_STORE is set" if given is None else "--store is given"
        raise ConfigurationError(f"{where}, and empty: name a store there, or leave it out.")
    return url


def _demo(options: argparse.Namespace) -> int:
    from nonstick.commands.demo import acts

    return acts.run(store=options.store, sdk=options.sdk, nodes=options.nodes)


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
    _add_doctor(commands)
    _add_migrate(commands)
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
        help="where sessions live: sqlite:///FILE (processes of one machine), redis://HOST:PORT/DB, "
        "redis+cluster://HOST,HOST, redis+sentinel://HOST,HOST/SERVICE, "
        "postgresql://USER@HOST/DB, or memory: (this process only). Default: $NONSTICK_STORE, else sqlite:///.nonstick/sessions.db",
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
        choices=get_args(Answer),
        default=Settings.answer,
        help="how a request is answered: auto is JSON, or a stream if the handler sends something first or takes "
        "longer; sse is always a stream; json is never one. Default: %(default)s",
    )
    parser.add_argument(
        "--placement",
        choices=get_args(Placement),
        default=Settings.placement,
        help="which nodes serve a session: any of them; none, there are no sessions; or the one that opened it, which "
        "the others relay to and with which it ends. Default: %(default)s",
    )
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=Settings.grace,
        metavar="SECONDS",
        help="how long a stop (SIGTERM) waits for what runs. Default: %(default)g",
    )
    parser.add_argument(
        "--lease",
        type=_lease,
        default=Settings.lease,
        metavar="SECONDS",
        help="how long a node that is not heard of counts as alive; after that, and a few seconds, whoever waits for "
        "a request that it ran gets an error. Default: %(default)g",
    )
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        type=_setting,
        default=[],
        metavar="NAME=VALUE",
        help="any other setting of nonstick.app(), say max_sessions=50000 or send_timeout=10; may be given several "
        "times. The limits and their defaults are in docs/limits.md, the other settings in docs/cli.md",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="one line per record either way, on stderr. Default: %(default)s",
    )
    parser.add_argument("--log-level", choices=log_format.LEVELS, default="info", help="Default: %(default)s")
    parser.set_defaults(run=_serve)


_STORE_HELP = "the store, as for `nonstick serve`. Default: $NONSTICK_STORE"


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what is wrong with a store, and what to do",
        description="Looks at a store, tries it as two nodes would, and says for each finding what to do.",
        epilog=_DOCTOR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target", metavar="TARGET", nargs="?", help="a server, as for `nonstick serve`; may be left out"
    )
    parser.add_argument("--store", metavar="URL", help=_STORE_HELP)
    parser.add_argument("--json", action="store_true", help="for machines: an object with `ok` and `findings`")
    parser.set_defaults(run=_doctor)


def _add_migrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "migrate",
        help="make or upgrade a store's tables",
        description="Shows the version of a store's tables and the one that this release uses, and makes or upgrades "
        "them. Several at once are fine.",
        epilog=_MIGRATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--store", metavar="URL", help=_STORE_HELP)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="only say what would be done")
    how.add_argument("--print-sql", action="store_true", help="print the SQL instead of executing it")
    parser.set_defaults(run=_migrate)


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


def _setting(text: str) -> tuple[str, Any]:
    """One `--set NAME=VALUE`. What the value must be is said where the server is made."""
    name, _, value = text.partition("=")
    if not name.isidentifier() or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if name in _OPTIONS:
        raise argparse.ArgumentTypeError(f"{name!r} has an option of its own: {_OPTIONS[name]}")
    if name == "encryption_keys":
        raise argparse.ArgumentTypeError("encryption_keys is a secret: it is given in NONSTICK_ENCRYPTION_KEYS")
    known = arguments_of(app)
    if name not in known:
        meant = close_to(name, [*known, *_OPTIONS])
        hint = f": did you mean {_OPTIONS.get(meant, meant)}?" if meant else "; docs/limits.md and docs/cli.md have all"
        raise argparse.ArgumentTypeError(f"there is no setting {name!r}{hint}")
    match said_as(name, app):
        case "text":
            return name, value
        case "nothing":
            raise argparse.ArgumentTypeError(f"{name!r} can only be given to nonstick.app(), in Python")
    try:
        return name, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{value!r} is no value of {name}: give a number, true, false, null, or a list as ["a", "b"]'
        ) from None


def _path(text: str) -> str:
    if not text.startswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r} does not start with a slash")
    return text


if __name__ == "__main__":
    sys.exit(main())
