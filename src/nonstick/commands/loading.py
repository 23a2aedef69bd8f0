"""Finds the MCP server that `nonstick serve TARGET` names.

`TARGET` is `package.module:name` or `path/to/file.py:name`. What stands there is a server of the SDK or of FastMCP, a
Starlette app with MCP endpoints, or a function without arguments, sync or async, that makes one. Every way in which
that can fail is a `TargetError` that says what to do.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeGuard, TypeVar, Union, cast

from mcp.server import MCPServer, Server
from starlette.applications import Starlette

from nonstick import fastmcp
from nonstick.app import App
from nonstick.errors import ConfigurationError, close_to

if TYPE_CHECKING:
    from fastmcp import FastMCP

__all__ = ["AnyServer", "Factory", "Found", "TargetError", "call", "find", "is_app", "is_server"]

T = TypeVar("T")

AnyServer = Union[MCPServer[Any], Server[Any], "FastMCP[Any]", Starlette]
"""What can be served: a server, or an app that has MCP endpoints."""

Factory = Callable[[], "AnyServer | Awaitable[AnyServer]"]
Found = AnyServer | Factory

DEFAULT_NAMES: Final = ("mcp", "server", "app")
"""Which object is meant where the target names none, and the module has not exactly one server."""

_NOT_THEIRS: Final = (__file__, str(Path(importlib.__file__).parent), "<frozen")
"""How the names of files begin whose frames a traceback leaves out."""

_ABOVE: Final = "Its traceback is above."
_SHAPES: Final = "Write package.module:name or path/to/file.py:name."
_KINDS: Final = "an MCPServer, a low-level Server, a FastMCP server, or a Starlette or FastAPI app that has one in it"
_WANTED: Final = f"{_KINDS}, or a function without arguments that returns one of these"
_OURS: Final = " This is what nonstick.app() made, with its own store: run it with uvicorn, or name the server in it."


class TargetError(ConfigurationError):
    """The target names no server.

    Attributes:
        trace: The traceback of the user's own code, if that is what failed, else "".
    """

    def __init__(self, message: str, *, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


def find(target: str) -> Found:
    """The server or factory that `target` names. Imports its module; does not call a factory.

    The working directory is put on `sys.path` for a module, the file's own directory for a file.

    Raises:
        TargetError: There is no such file, module or name; its module raises; or it is no server.
    """
    place, _, name = target.partition(":")
    is_path = place.endswith(".py") or "/" in place or os.sep in place
    if not is_path and not all(part.isidentifier() for part in place.split(".")):
        raise TargetError(f"{target!r} names no module. {_SHAPES}")
    module = _load_file(Path(place)) if is_path else _load_module(place)
    return _named(module, place, name) if name else _only(module, place)


async def call(found: Found, target: str) -> AnyServer:
    """The server itself: what a factory returns, or `found` as it is.

    Raises:
        TargetError: The factory raises, or what it returns is no server.
    """
    if is_server(found) or is_app(found):
        return found
    try:
        made: object = cast("Factory", found)()
        if inspect.isawaitable(made):
            made = await made
    except Exception as error:
        raise _failed(f"{target} raised", error) from error
    if is_server(made) or is_app(made):
        return made
    raise TargetError(f"what {target} returned is {_no_server(made)} Return {_KINDS}.")


def is_server(thing: object) -> TypeGuard[MCPServer[Any] | Server[Any] | FastMCP[Any]]:
    """Whether it is an MCP server."""
    return isinstance(thing, MCPServer | Server) or fastmcp.is_server(thing)


def is_app(thing: object) -> TypeGuard[Starlette]:
    """Whether it is an app that may have MCP endpoints. What `nonstick.app` made has a store of its own."""
    return isinstance(thing, Starlette) and not isinstance(thing, App)


# ---- the module


def _load_file(path: Path) -> ModuleType:
    if path.suffix != ".py" or not path.is_file():
        close = close_to(path.name, [file.name for file in path.parent.glob("*.py")])
        hint = f"Did you mean {path.parent / close}?" if close else _SHAPES
        raise TargetError(f"{path} {'is no Python file' if path.exists() else 'does not exist'}. {hint}")
    place, path = str(path), path.resolve()
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        parts.insert(0, root.name)
        root = root.parent
    _prepend(root)
    if len(parts) > 1:  # part of a package: its relative imports must work
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        return _imported(place, lambda: importlib.import_module(name))
    return _imported(place, lambda: _execute(path))


def _execute(path: Path) -> ModuleType:
    # Under its own name, as an import of it from a neighbour finds it, unless it would hide a module of that name.
    name = path.stem if path.stem not in sys.modules and path.stem not in sys.stdlib_module_names else f"_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_module(name: str) -> ModuleType:
    _prepend(Path.cwd())
    for part in accumulate(name.split("."), "{}.{}".format):
        if _imported(name, partial(importlib.util.find_spec, part)) is None:
            raise TargetError(f"there is no module {part!r}. Looked in {Path.cwd()} and on the Python path.")
    return _imported(name, lambda: importlib.import_module(name))


def _imported(place: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except (Exception, SystemExit) as error:
        advice = 'Put that under `if __name__ == "__main__":`.' if isinstance(error, SystemExit) else _ABOVE
        raise _failed(f"importing {place} failed:", error, advice) from error


def _prepend(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


def _failed(what: str, error: BaseException, advice: str = _ABOVE) -> TargetError:
    """The user's own code raised. The traceback begins there: our frames and the import machinery's are left out."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_NOT_THEIRS):
        trace = trace.tb_next
    last_line = traceback.format_exception_only(error)[-1].strip().rstrip(".")
    shown = "".join(traceback.format_exception(type(error), error, trace))
    return TargetError(f"{what} {last_line}. {advice}", trace=shown)


# ---- the name in it


def _named(module: ModuleType, place: str, name: str) -> Found:
    thing: object = module
    for part in name.split("."):
        try:
            thing = getattr(thing, part)
        except AttributeError:
            raise TargetError(f"{place} has no {name!r}. {_candidates(module, place)}") from None
    if is_server(thing) or is_app(thing) or _is_factory(thing):
        return thing
    raise TargetError(f"{place}:{name} is {_no_server(thing)} Name {_WANTED}.")


def _only(module: ModuleType, place: str) -> Found:
    servers = {name: thing for name, thing in vars(module).items() if is_server(thing)}
    if len({id(server) for server in servers.values()}) == 1:
        return next(iter(servers.values()))
    for name in DEFAULT_NAMES:
        if name in servers:
            return servers[name]
        if not servers and not isinstance(getattr(module, name, None), ModuleType | None):
            return _named(module, place, name)
    which = "has several MCP servers" if servers else "has no MCP server object"
    raise TargetError(f"{place} {which}. {_candidates(module, place)}")


def _candidates(module: ModuleType, place: str) -> str:
    """What could have been meant, as something to type: servers, else functions of the module that may make one."""
    there = [name for name, thing in vars(module).items() if is_server(thing)] or [
        name
        for name, thing in vars(module).items()
        if _is_factory(thing) and getattr(thing, "__module__", "") == module.__name__
    ]
    return f"Try {' or '.join(f'{place}:{name}' for name in there[:5])}." if there else f"It must hold {_WANTED}."


def _is_factory(thing: object) -> TypeGuard[Factory]:
    """Whether it can be called without arguments. Classes and ASGI applications are callable, but make no server."""
    if not callable(thing) or inspect.isclass(thing):
        return False
    try:
        inspect.signature(thing).bind()
    except (TypeError, ValueError):
        return False
    return True


def _no_server(thing: object) -> str:
    """What it is, as the end of a sentence that began with its name."""
    return f"of type {type(thing).__qualname__}, not an MCP server.{_OURS if isinstance(thing, App) else ''}"
