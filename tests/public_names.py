"""Fails on any use of a private name of the MCP SDK or of FastMCP: `python -m tests.public_names`.

Both change their private names in any release, so that nonstick uses public ones only. What is private is not always
to be seen in one file, so this errs on the strict side: an underscore attribute must be defined by us. It looks at

* imports of modules and names with a leading underscore under `mcp`, `mcp_types` and `fastmcp`, also as strings;
* attributes with a leading underscore: on `self` and `cls`, the name must be defined somewhere in our code; on anything
  else, in the same module, or somewhere in our code if those packages know no such name. Attributes of the standard
  library's modules and of named tuples are theirs to offer;
* the same by `getattr`, `setattr`, `hasattr`, `delattr`, `attrgetter`, `vars(x)[...]` and `x.__dict__[...]`.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

PLACES: Final = ("src", "tests", "examples", "bench")
PACKAGES: Final = ("mcp", "mcp_types", "fastmcp")

_OFFERED: Final = frozenset({"_replace", "_asdict", "_fields", "_field_defaults", "_make"})
"""Underscore names that are public by their documentation: those of named tuples."""

_ACCESSORS: Final = frozenset({"getattr", "setattr", "hasattr", "delattr", "attrgetter"})
_LOOKUPS: Final = frozenset({"get", "pop", "setdefault", "__getitem__"})
_SKIPPED: Final = frozenset({"node_modules", ".venv", "__pycache__"})
"""Folders of code that is not ours."""

_PRIVATE_PATH: Final = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)*\.(_\w+)(?:\.\w+)*")
_PRIVATE_NAME: Final = re.compile(r"(?<!\w)_[A-Za-z]\w*")


class Finding(NamedTuple):
    """A private name and where it is used."""

    path: Path
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: private name {self.name}"


def is_private(name: str) -> bool:
    """Whether the name begins with an underscore; `_` itself and `__dunder__` names do not count."""
    return name.startswith("_") and name.strip("_") != "" and not (name.startswith("__") and name.endswith("__"))


def defined(tree: ast.AST) -> set[str]:
    """The private names that this module defines: functions, classes, variables, fields and attributes of `self`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id="__slots__")], value=ast.Tuple(elts=slots) | ast.List(elts=slots)):
                names |= {
                    slot.value for slot in slots if isinstance(slot, ast.Constant) and isinstance(slot.value, str)
                }
    return {name for name in names if is_private(name)}


def standard_modules(tree: ast.AST) -> set[str]:
    """The names by which this module knows modules of the standard library."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in sys.stdlib_module_names:
                    names.add(alias.asname or alias.name.partition(".")[0])
    return names


def private_names_of(packages: Iterable[str] = PACKAGES) -> set[str]:
    """Every private name in the text of these packages, as far as they are installed."""
    names: set[str] = set()
    for package in packages:
        spec = importlib.util.find_spec(package)
        for home in (spec and spec.submodule_search_locations) or ():
            for path in Path(home).rglob("*.py"):
                names |= set(_PRIVATE_NAME.findall(path.read_text(encoding="utf-8")))
    return names


class Checker:
    """Looks through one module; any module of ours defines `ours`, those packages have `theirs`."""

    def __init__(self, tree: ast.AST, ours: set[str], theirs: set[str]) -> None:
        self._tree = tree
        self._ours = ours
        self._here = defined(tree) | (ours - theirs)
        self._standard = standard_modules(tree)

    def found(self) -> Iterator[tuple[int, str]]:
        """Line and name of each use."""
        for node in ast.walk(self._tree):
            for name in (*self._imported(node), *self._reached(node)):
                yield getattr(node, "lineno", 0), name

    def _imported(self, node: ast.AST) -> Iterator[str]:
        match node:
            case ast.Import(names=names):
                paths = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                paths = [f"{module}.{alias.name}" for alias in names]
            case ast.Constant(value=str(text)):
                paths = [text]
            case _:
                return
        for path in paths:
            private = _PRIVATE_PATH.fullmatch(path)
            if private is not None and is_private(private[1]):
                yield path

    def _reached(self, node: ast.AST) -> Iterator[str]:
        match node:
            case ast.Attribute(value=value, attr=name):
                yield from self._unless_ours(value, name)
            case ast.Call(func=ast.Name(id=accessor) | ast.Attribute(attr=accessor), args=arguments):
                if accessor in _ACCESSORS:
                    yield from self._by_string(arguments)
                if accessor in _LOOKUPS and isinstance(node.func, ast.Attribute) and arguments:
                    yield from self._in_namespace(node.func.value, arguments[0])
            case ast.Subscript(value=value, slice=index):
                yield from self._in_namespace(value, index)
            case ast.MatchClass(kwd_attrs=names):
                yield from (name for name in names if is_private(name) and name not in self._here)

    def _by_string(self, arguments: list[ast.expr]) -> Iterator[str]:
        for target, argument in zip([None, *arguments], arguments, strict=False):
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                for name in argument.value.split("."):
                    yield from self._unless_ours(target, name)

    def _in_namespace(self, value: ast.expr, index: ast.expr) -> Iterator[str]:
        match value:
            case ast.Call(func=ast.Name(id="vars"), args=[owner]) | ast.Attribute(value=owner, attr="__dict__"):
                if isinstance(index, ast.Constant) and isinstance(index.value, str):
                    yield from self._unless_ours(owner, index.value)

    def _unless_ours(self, owner: ast.expr | None, name: str) -> Iterator[str]:
        if not is_private(name) or name in self._here or name in _OFFERED:
            return
        match owner:
            case ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super")):
                if name in self._ours:
                    return
            case ast.Name(id=module) if module in self._standard:
                return
        yield name


def check(root: Path, theirs: set[str] | None = None) -> list[Finding]:
    """Every use of a private name in our Python files; `theirs` are those of the installed packages."""
    theirs = private_names_of() if theirs is None else theirs
    paths = sorted(path for place in PLACES for path in (root / place).rglob("*.py") if _SKIPPED.isdisjoint(path.parts))
    trees = {path: ast.parse(path.read_bytes(), str(path)) for path in paths}
    ours = set().union(*map(defined, trees.values()))
    return [
        Finding(path.relative_to(root), line, name)
        for path, tree in trees.items()
        for line, name in Checker(tree, ours, theirs).found()
    ]


def main(arguments: list[str]) -> int:
    """Prints each finding; 1 if there is one."""
    root = Path(arguments[0]) if arguments else Path(__file__).parent.parent
    findings = check(root)
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
