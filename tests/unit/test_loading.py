"""A target names a server, or the error says what to write instead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mcp.server import MCPServer, Server

from nonstick.commands import loading
from nonstick.errors import ConfigurationError

pytestmark = pytest.mark.anyio

Write = Callable[[str, str], Path]

SERVER = "from mcp.server import MCPServer\n"


@pytest.fixture(autouse=True)
def forget_modules() -> Iterator[None]:
    """What a test imports is gone after it."""
    path, modules = sys.path[:], set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith(("mcp.", "starlette.", "fastmcp", "fastapi")):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, source: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        return path

    return write


def error_of(target: str) -> loading.TargetError:
    with pytest.raises(loading.TargetError) as caught:
        loading.find(target)
    assert isinstance(caught.value, ConfigurationError)
    return caught.value


def test_name_in_a_file_is_found(write: Write) -> None:
    write("weather_a.py", f"{SERVER}one = MCPServer('one')\ntwo = MCPServer('two')\n")
    found = loading.find("weather_a.py:two")
    assert isinstance(found, MCPServer)
    assert found.name == "two"


def test_module_is_found_from_working_directory(write: Write) -> None:
    write("pkg_b/__init__.py", "")
    write("pkg_b/weather.py", f"{SERVER}class holder:\n    inner = MCPServer('inner')\n")
    found = loading.find("pkg_b.weather:holder.inner")
    assert isinstance(found, MCPServer)


def test_packaged_file_keeps_relative_imports(write: Write) -> None:
    write("pkg_c/__init__.py", "")
    write("pkg_c/names.py", "NAME = 'related'\n")
    write("pkg_c/server.py", f"{SERVER}from .names import NAME\nmcp = MCPServer(NAME)\n")
    found = loading.find("pkg_c/server.py")
    assert isinstance(found, MCPServer)
    assert found.name == "related"


def test_file_finds_its_neighbours(write: Write) -> None:
    write("sub_d/neighbour_d.py", "NAME = 'next door'\n")
    write("sub_d/main_d.py", f"{SERVER}import neighbour_d\nmcp = MCPServer(neighbour_d.NAME)\n")
    assert isinstance(loading.find("sub_d/main_d.py:mcp"), MCPServer)


def test_file_beats_installed_modules_name(write: Write) -> None:
    """A file that is named like an installed module is loaded all the same."""
    write("mcp.py", f"{SERVER}server = MCPServer('shadow')\n")
    assert isinstance(loading.find("./mcp.py"), MCPServer)
    assert hasattr(sys.modules["mcp"], "Client")


def test_only_server_needs_no_name(write: Write) -> None:
    write("only_e.py", "from mcp.server import Server\nwhatever = Server('only')\nalias = whatever\n")
    assert isinstance(loading.find("only_e.py"), Server)


def test_conventional_name_wins_among_several(write: Write) -> None:
    write("several_f.py", f"{SERVER}other = MCPServer('other')\nserver = MCPServer('chosen')\n")
    found = loading.find("several_f.py")
    assert isinstance(found, MCPServer)
    assert found.name == "chosen"


def test_several_unconventional_servers_are_listed(write: Write) -> None:
    write("several_g.py", f"{SERVER}red = MCPServer('r')\nblue = MCPServer('b')\n")
    assert "several_g.py:red or several_g.py:blue" in str(error_of("several_g.py"))


@pytest.mark.parametrize("prefix", ["", "async "])
async def test_factory_makes_the_server(write: Write, prefix: str) -> None:
    write("factory_h.py", f"{SERVER}{prefix}def make(name='made'):\n    return MCPServer(name)\n")
    made = await loading.call(loading.find("factory_h.py:make"), "factory_h.py:make")
    assert isinstance(made, MCPServer)
    assert made.name == "made"


async def test_server_needs_no_call() -> None:
    server = MCPServer("as it is")
    assert await loading.call(server, "x:y") is server


async def test_raising_factory_shows_own_traceback(write: Write) -> None:
    write("factory_i.py", "def make():\n    raise RuntimeError('no database')\n")
    with pytest.raises(loading.TargetError, match=r"factory_i.py:make raised RuntimeError: no database\.") as caught:
        await loading.call(loading.find("factory_i.py:make"), "factory_i.py:make")
    assert "raise RuntimeError('no database')" in caught.value.trace
    assert "loading.py" not in caught.value.trace


async def test_factory_of_something_else_is_refused(write: Write) -> None:
    write("factory_j.py", "def make():\n    return None\n")
    with pytest.raises(
        loading.TargetError, match=r"factory_j\.py:make returned is of type NoneType, not an MCP server"
    ):
        await loading.call(loading.find("factory_j.py:make"), "factory_j.py:make")


def test_missing_file_suggests_one_like_it(write: Write) -> None:
    write("weather_k.py", "")
    message = str(error_of("wether_k.py:mcp"))
    assert message.startswith("wether_k.py does not exist.")
    assert "Did you mean weather_k.py?" in message


def test_directory_is_no_file(write: Write) -> None:
    write("folder_l/x.py", "")
    assert "folder_l is no Python file" in str(error_of("./folder_l:mcp"))


def test_missing_module_says_searched_places(write: Write, tmp_path: Path) -> None:
    write("unrelated.py", "")
    message = str(error_of("no_such_module_m:mcp"))
    assert "there is no module 'no_such_module_m'" in message
    assert str(tmp_path) in message


def test_missing_submodule_is_named_in_full(write: Write) -> None:
    write("pkg_n/__init__.py", "")
    assert "there is no module 'pkg_n.absent'" in str(error_of("pkg_n.absent:mcp"))


def test_missing_dependency_is_told_apart(write: Write) -> None:
    """It is not taken for the module that was asked for."""
    write("needs_o.py", "import no_such_dependency_o\n")
    failure = error_of("needs_o:mcp")
    assert "importing needs_o failed: ModuleNotFoundError: No module named 'no_such_dependency_o'" in str(failure)
    assert "import no_such_dependency_o" in failure.trace
    assert "loading.py" not in failure.trace
    assert "importlib" not in failure.trace


@pytest.mark.parametrize("target", ["broken_p.py:mcp", "broken_p:mcp"])
def test_raising_module_shows_own_traceback(write: Write, target: str) -> None:
    write("broken_p.py", "def setup():\n    return 1 / 0\nsetup()\n")
    failure = error_of(target)
    assert "failed: ZeroDivisionError: division by zero." in str(failure)
    assert "return 1 / 0" in failure.trace
    assert "loading.py" not in failure.trace


def test_raising_package_shows_own_traceback(write: Write) -> None:
    write("pkg_p/__init__.py", "def setup():\n    return 1 / 0\nsetup()\n")
    write("pkg_p/server.py", "")
    failure = error_of("pkg_p.server:mcp")
    assert "importing pkg_p.server failed: ZeroDivisionError: division by zero." in str(failure)
    assert "return 1 / 0" in failure.trace
    assert "loading.py" not in failure.trace
    assert "importlib" not in failure.trace


def test_default_name_of_none_is_skipped(write: Write) -> None:
    """A conventional name that holds nothing is passed over."""
    write("nothing_p.py", f"{SERVER}mcp = None\ndef server():\n    return MCPServer('made')\n")
    assert callable(loading.find("nothing_p.py"))


def test_syntax_error_shows_its_place(write: Write) -> None:
    write("typo_q.py", "def broken(:\n")
    failure = error_of("typo_q.py:mcp")
    assert "SyntaxError" in str(failure)
    assert "def broken(:" in failure.trace


def test_exiting_module_hears_of_main_guard(write: Write) -> None:
    write("script_r.py", "raise SystemExit(0)\n")
    assert '__name__ == "__main__"' in str(error_of("script_r.py:mcp"))


def test_missing_name_lists_the_servers_there(write: Write) -> None:
    write("names_s.py", f"{SERVER}weather = MCPServer('w')\n")
    assert str(error_of("names_s.py:mcp")) == "names_s.py has no 'mcp'. Try names_s.py:weather."


def test_missing_name_lists_possible_factories(write: Write) -> None:
    write("names_t.py", "def make_server():\n    ...\ndef needs(x):\n    ...\n")
    message = str(error_of("names_t.py:make_servr"))
    assert "names_t.py:make_server" in message
    assert "needs" not in message


def test_module_without_server_is_advised(write: Write) -> None:
    """The error says what the module must hold."""
    write("empty_u.py", "x = 1\n")
    assert "must hold an MCPServer" in str(error_of("empty_u.py"))


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        ("thing = 42", "thing", "of type int"),
        ("thing = None", "thing", "of type NoneType"),
        ("class Thing: ...", "Thing", "of type type"),
        ("def thing(a, b=1): ...", "thing", "of type function"),
        ("import json as thing", "thing", "of type module"),
        ("from starlette.routing import Router\nthing = Router()", "thing", "of type Router"),
    ],
)
def test_object_without_server_is_described(write: Write, source: str, name: str, said: str) -> None:
    write("things_v.py", source)
    message = str(error_of(f"things_v.py:{name}"))
    assert f"things_v.py:{name} is {said}, not an MCP server. Name an MCPServer" in message


FASTMCP = "from fastmcp import FastMCP\nshop = FastMCP('shop')\n"


@pytest.mark.parametrize("target", ["shop_w.py", "shop_w.py:shop"])
def test_fastmcp_server_is_found(write: Write, target: str) -> None:
    write("shop_w.py", FASTMCP)
    found = loading.find(target)
    assert loading.is_server(found)
    assert found.name == "shop"


async def test_factory_makes_fastmcp_server_or_app(write: Write) -> None:
    write("shops_w.py", f"{FASTMCP}def server():\n    return shop\ndef app():\n    return shop.http_app()\n")
    assert loading.is_server(await loading.call(loading.find("shops_w.py:server"), "x"))
    assert loading.is_app(await loading.call(loading.find("shops_w.py:app"), "x"))


@pytest.mark.parametrize(
    "source",
    [
        "from fastmcp import FastMCP\napp = FastMCP('shop').http_app()\n",
        f"{SERVER}app = MCPServer('shop').streamable_http_app()\n",
        "from fastapi import FastAPI\napp = FastAPI()\n",
    ],
)
@pytest.mark.parametrize("target", ["web_w.py", "web_w.py:app"])
def test_app_is_found(write: Write, source: str, target: str) -> None:
    """Whether it has an MCP endpoint is seen when it is taken over."""
    write("web_w.py", source)
    assert loading.is_app(loading.find(target))


def test_nonsticks_own_app_is_refused(write: Write) -> None:
    write("own_w.py", f"import nonstick\n{SERVER}app = nonstick.app(MCPServer('shop'), store='memory:')\n")
    assert "This is what nonstick.app() made, with its own store" in str(error_of("own_w.py:app"))


@pytest.mark.parametrize("target", [":mcp", "", "not-a-module:mcp", "a..b:c"])
def test_odd_target_shows_the_shapes(target: str) -> None:
    assert "package.module:name or path/to/file.py:name" in str(error_of(target))
