"""Finds the MCP server that `nonstick serve TARGET` names.

`TARGET` is `package.module:name` or `path/to/file.py:name`. What stands there is a server of the SDK or of FastMCP, a
Starlette app with MCP endpoints, or a function without arguments, sync or async, that makes one. Every way in which
that can fail is a `TargetError` that says what to do.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeGuard, Union, cast

from mcp.server import MCPServer, Server
from starlette.applications import Starlette

from nonstick import fastmcp as fastmcp_server
from nonstick.app import App
from nonstick.errors import ConfigurationError

if TYPE_CHECKING:
    from fastmcp import FastMCP

__all__ = ["AnyServer", "Factory", "Found", "TargetError", "call", "find", "is_server"]

AnyServer = Union[MCPServer[Any], Server[Any], "FastMCP[Any]", Starlette]
"""What can be served: a server, or an app that has MCP endpoints."""

Factory = Callable[[], "AnyServer | Awaitable[AnyServer]"]
Found = AnyServer | Factory

DEFAULT_NAMES: Final = ("mcp", "server", "app")
"""Which object is meant, if the module has several servers and the target names none."""

_KINDS: Final = "an MCPServer, a low-level Server, a FastMCP server, or a Starlette or FastAPI app that has one in it"
_WANTED: Final = f"{_KINDS}, or a function without arguments that returns one of these"


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
    if not place:
        raise TargetError(f"{target!r} names no module. Write package.module:name or path/to/file.py:name.")
    module = _load_file(Path(place)) if _is_path(place) else _load_module(place)
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
        trace = _own_trace(error)
        raise TargetError(f"{target} raised {_last_line(error)}. Its traceback is above.", trace=trace) from error
    if is_server(made) or is_app(made):
        return made
    raise TargetError(f"{target} returned {_describe(made)}, not an MCP server. Return {_KINDS}.{_own_hint(made)}")


def is_server(thing: object) -> TypeGuard[MCPServer[Any] | Server[Any] | FastMCP[Any]]:
    """Whether it is an MCP server."""
    return isinstance(thing, MCPServer | Server) or fastmcp_server.is_server(thing)


def is_app(thing: object) -> TypeGuard[Starlette]:
    """Whether it is an app that may have MCP endpoints. What `nonstick.app` made has a store of its own."""
    return isinstance(thing, Starlette) and not isinstance(thing, App)


# ---- the module


def _is_path(place: str) -> bool:
    return place.endswith(".py") or "/" in place or os.sep in place


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        missing = "is a directory" if path.is_dir() else "does not exist"
        raise TargetError(f"{path} {missing}. Give the path of a Python file, as in path/to/file.py:name.{_near(path)}")
    place, path = str(path), path.resolve()
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        parts.insert(0, root.name)
        root = root.parent
    _prepend(root)
    if len(parts) > 1:  # part of a package: its relative imports must work
        return _import(".".join(parts[:-1] if parts[-1] == "__init__" else parts), place)
    return _execute(path, place)


def _near(path: Path) -> str:
    """A hint at a file of a similar name."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix == ".py"]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _execute(path: Path, place: str) -> ModuleType:
    # Under its own name, as an import of it from a neighbour finds it, unless it would hide a module of that name.
    name = path.stem if path.stem not in sys.modules and path.stem not in sys.stdlib_module_names else f"_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{place} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _import_failed(place, error) from error
    return module


def _load_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise TargetError(f"{name!r} is not a module's name. Write package.module:name or path/to/file.py:name.")
    _prepend(Path.cwd())
    return _import(name, name)


def _import(name: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            file = Path(*name.split(".")).with_suffix(".py")
            hint = f" Did you mean {file}?" if file.is_file() else f" Looked in {Path.cwd()} and on the Python path."
            raise TargetError(f"there is no module {error.name!r}.{hint}") from error
        raise _import_failed(place, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(place, error) from error


def _import_failed(place: str, error: BaseException) -> TargetError:
    what = _last_line(error)
    if isinstance(error, ModuleNotFoundError):
        advice = "Install what is missing into the environment that nonstick runs in."
    elif isinstance(error, SystemExit):
        advice = 'What it runs as a script belongs under `if __name__ == "__main__":`.'
    else:
        advice = "Its traceback is above."
    return TargetError(f"importing {place} failed: {what}. {advice}", trace=_own_trace(error))


def _prepend(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


def _last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip().rstrip(".")


def _own_trace(error: BaseException) -> str:
    """The traceback from where the user's code begins: ours and the import machinery's frames are left out."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and _is_ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


def _is_ours(filename: str) -> bool:
    return filename == __file__ or filename == importlib.__file__ or filename.startswith("<frozen importlib")


# ---- the name in it


def _named(module: ModuleType, place: str, name: str) -> Found:
    thing: object = module
    for part in name.split("."):
        try:
            thing = getattr(thing, part)
        except AttributeError:
            raise TargetError(f"{place} has no {name!r}. {_candidates(module, place, name)}") from None
    if is_server(thing) or is_app(thing) or _is_factory(thing):
        return thing
    raise TargetError(f"{place}:{name} is {_describe(thing)}, not an MCP server. Name {_WANTED}.{_own_hint(thing)}")


def _only(module: ModuleType, place: str) -> Found:
    servers = _servers(module)
    if len({id(server) for server in servers.values()}) == 1:
        return next(iter(servers.values()))
    for name in DEFAULT_NAMES:
        if name in servers:
            return servers[name]
    for name in DEFAULT_NAMES:
        thing = getattr(module, name, None)
        if thing is not None and not isinstance(thing, ModuleType) and not servers:
            return _named(module, place, name)
    which = "has several MCP servers" if servers else "has no MCP server object"
    raise TargetError(f"{place} {which}. {_candidates(module, place)}")


def _servers(module: ModuleType) -> dict[str, MCPServer[Any] | Server[Any] | FastMCP[Any]]:
    return {name: thing for name, thing in vars(module).items() if is_server(thing)}


def _candidates(module: ModuleType, place: str, wanted: str = "") -> str:
    """What could have been meant, as something to type."""
    servers = list(_servers(module))
    factories = [
        name
        for name, thing in vars(module).items()
        if inspect.isfunction(thing) and thing.__module__ == module.__name__ and _is_factory(thing)
    ]
    if servers:
        return f"Try {_listed(f'{place}:{name}' for name in servers)}."
    close = difflib.get_close_matches(wanted, factories, n=1) if wanted else []
    if factories:
        return f"If a function makes the server, name it: {_listed(f'{place}:{name}' for name in close or factories)}."
    return f"The module must hold {_WANTED}."


def _listed(items: Iterable[str]) -> str:
    *rest, last = list(items)[:5]
    return f"{', '.join(rest)} or {last}" if rest else last


def _is_factory(thing: object) -> TypeGuard[Factory]:
    """Whether it can be called without arguments. Classes and ASGI applications are callable, but make no server."""
    if not callable(thing) or inspect.isclass(thing):
        return False
    try:
        inspect.signature(thing).bind()
    except (TypeError, ValueError):
        return False
    return True


def _describe(thing: object) -> str:
    """What it is, in a few words."""
    if thing is None:
        return "None"
    if inspect.isclass(thing):
        return f"the class {thing.__qualname__}"
    if inspect.isfunction(thing):
        return f"a function that needs arguments, {thing.__name__}{inspect.signature(thing)}"
    if isinstance(thing, ModuleType):
        return f"the module {thing.__name__}"
    kind = type(thing)
    return (
        f"a {kind.__module__.partition('.')[0]}.{kind.__qualname__}"
        if kind.__module__ != "builtins"
        else (f"of type {kind.__qualname__}")
    )


def _own_hint(thing: object) -> str:
    """What to do with an app that is nonstick's already: it has a store."""
    if isinstance(thing, App):
        return " This is what nonstick.app() made, with its own store: run it with uvicorn, or name the server in it."
    return ""
