"""The check for private names of the SDK catches what it is there for, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.public_names import PLACES, check, main, private_names_of

BAD = {
    "a private module": "import mcp._internal",
    "a private module inside": "import mcp.server._memory as memory",
    "a name of a private module": "from mcp.server._memory import Thing",
    "a private name": "from mcp.shared.session import _helper",
    "a private module by from": "from mcp_types import _base",
    "FastMCP's private module": "from fastmcp.server._x.y import Z",
    "a module inside a function": "def f():\n    import mcp._x",
    "a module by its name": "import importlib\nimportlib.import_module('mcp.server._memory')",
    "a patched name": "def test(monkeypatch):\n    monkeypatch.setattr('mcp.server.thing._name', 1)",
    "an attribute": "def f(server):\n    return server._sessions",
    "an attribute of an attribute": "def f(server):\n    return server.manager._sessions.clear()",
    "an attribute that is set": "def f(server):\n    server._ready = True",
    "an attribute that is deleted": "def f(server):\n    del server._ready",
    "an attribute of a call": "def f(make):\n    return make()._ready",
    "a mangled attribute": "def f(server):\n    return server._Server__secret",
    "an inherited attribute": "import mcp\nclass A(mcp.B):\n    def f(self):\n        return self._private",
    "an inherited method": "import mcp\nclass A(mcp.B):\n    def f(self):\n        return super()._run()",
    "a private attribute of a public module": "import mcp.server\nmcp.server._hidden",
    "getattr": "def f(server):\n    return getattr(server, '_sessions', None)",
    "getattr on self": "import mcp\nclass A(mcp.B):\n    def f(self):\n        getattr(self, '_private')",
    "setattr": "def f(server):\n    setattr(server, '_sessions', {})",
    "hasattr": "def f(server):\n    return hasattr(server, '_sessions')",
    "delattr": "def f(server):\n    delattr(server, '_sessions')",
    "attrgetter": "from operator import attrgetter\nget = attrgetter('manager._sessions')",
    "a patched attribute": "def test(monkeypatch, server):\n    monkeypatch.setattr(server, '_sessions', {})",
    "vars": "def f(server):\n    return vars(server)['_sessions']",
    "vars by get": "def f(server):\n    return vars(server).get('_sessions')",
    "__dict__": "def f(server):\n    return server.__dict__['_sessions']",
    "__dict__ by pop": "def f(server):\n    server.__dict__.pop('_sessions')",
    "a pattern": "def f(server):\n    match server:\n        case object(_sessions=found):\n            return found",
}

GOOD = {
    "public names": "import mcp.server\nfrom mcp.server.lowlevel import Server\nmcp.server.lowlevel",
    "our own attribute": "class A:\n    def __init__(self, a):\n        self._x = a._x",
    "our own method": "class A:\n    def _f(self): ...\ndef g(a):\n    return a._f()",
    "our own field": "class A:\n    _x: int\ndef g(a):\n    return a._x",
    "our own slot": "class A:\n    __slots__ = ('_x',)\ndef g(a):\n    return a._x",
    "our own function": "import ours\ndef _f(): ...\nours._f()",
    "an own name by getattr": "class A:\n    _x = 1\ngetattr(A(), '_x')",
    "named tuples": "def f(event):\n    return event._replace(position=1), event._asdict(), event._fields",
    "dunder names": "def f(x):\n    return x.__class__.__name__, x.__dict__, vars(x), getattr(x, '__doc__')",
    "the standard library": "import os, sys\nimport socket as s\nos._exit(1); sys._getframe(); s._x",
    "other packages' modules": "from other import _thing\nimport other._module",
    "prose": "'''Not mcp._internal, which is private.'''\nx = 'see mcp.server._memory there'",
    "underscores": "for _ in range(3): ...\nfrom gettext import gettext as _\n_('x')\nx = {}\nx['_key']\nx.get('_key')",
    "public strings": "x = 'mcp.server.lowlevel'\ngetattr(x, 'name')",
}


def put(root: Path, code: str, place: str = "src/nonstick/module.py") -> None:
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code + "\n")


@pytest.mark.parametrize("code", BAD.values(), ids=BAD)
def test_private_name_is_found(tmp_path: Path, code: str) -> None:
    """Only public names of the SDK and of FastMCP are used."""
    put(tmp_path, code)
    assert check(tmp_path)


@pytest.mark.parametrize("code", GOOD.values(), ids=GOOD)
def test_public_and_own_names_pass(tmp_path: Path, code: str) -> None:
    """The check stays out of the way."""
    put(tmp_path, code)
    assert check(tmp_path) == []


def test_inherited_attribute_on_self_passes(tmp_path: Path) -> None:
    """On `self`, the name may be defined anywhere in our code."""
    put(tmp_path, "class A:\n    def __init__(self):\n        self._x = 1")
    put(tmp_path, "from nonstick.module import A\nclass B(A):\n    def f(self):\n        return self._x", "src/b.py")
    assert check(tmp_path, theirs={"_x"}) == []


def test_foreign_attribute_needs_unknown_name(tmp_path: Path) -> None:
    """On anything else than `self`, only where the packages know no such name: `server._x` could be the SDK's."""
    put(tmp_path, "class A:\n    def __init__(self):\n        self._x = 1")
    put(tmp_path, "def f(a):\n    return a._x", "tests/c.py")
    assert check(tmp_path, theirs=set()) == []
    assert [finding.path.name for finding in check(tmp_path, theirs={"_x"})] == ["c.py"]


def test_private_sdk_names_are_known() -> None:
    """Those of the installed version are read from its own text."""
    theirs = private_names_of()
    assert "_server_instances" in theirs
    assert all(name.startswith("_") for name in theirs)


@pytest.mark.parametrize("place", PLACES)
def test_every_folder_is_searched(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The program names file and line, and fails."""
    put(tmp_path, "x = 1\nimport mcp._x", f"{place}/deep/er/module.py")
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == f"{place}/deep/er/module.py:2: private name mcp._x\n"


def test_program_succeeds_without_findings(tmp_path: Path) -> None:
    """`python -m tests.public_names` is one command, and its exit status is the answer."""
    put(tmp_path, "import mcp")
    root = Path(__file__).parent.parent.parent
    for code, status in (("import mcp", 0), ("import mcp._x", 1)):
        put(tmp_path, code)
        assert subprocess.run([sys.executable, "-m", "tests.public_names", tmp_path], cwd=root).returncode == status
