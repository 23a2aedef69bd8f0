"""Modules, classes and names of tests are small enough to hold in mind. The lists of exceptions only shrink."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Final, NamedTuple

import nonstick
from nonstick.session.services import Services

HOME: Final = Path(nonstick.__file__).parent
TESTS: Final = Path(__file__).parents[1]

MODULE_LINES: Final = 450
CLASS_METHODS: Final = 28
CLASS_ATTRIBUTES: Final = 16
SERVICES: Final = 12
TEST_NAME_WORDS: Final = 6

LARGE_MODULES: Final[dict[str, int]] = {}
"""Lines that the modules which are larger may have."""

LARGE_CLASSES: Final[dict[str, tuple[int, int]]] = {}
"""Methods and attributes that the classes which have more may have."""


class Size(NamedTuple):
    """Of one class: its own methods, and the names that it keeps."""

    methods: int
    attributes: int


def size(cls: ast.ClassDef) -> Size:
    """Attributes are names assigned on `self`, fields that are declared in the class, and cached properties."""
    functions = [item for item in cls.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
    names = {
        item.target.id
        for item in cls.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not constant(item.annotation)
    }
    names |= {function.name for function in functions if any("cached" in ast.dump(d) for d in function.decorator_list)}
    names |= {
        item.attr
        for function in functions
        for item in ast.walk(function)
        if isinstance(item, ast.Attribute)
        and isinstance(item.ctx, ast.Store)
        and isinstance(item.value, ast.Name)
        and item.value.id == "self"
    }
    return Size(len(functions), len(names))


def constant(annotation: ast.expr) -> bool:
    """Whether a declared name belongs to the class alone."""
    return "ClassVar" in ast.dump(annotation) or "Final" in ast.dump(annotation)


def sources() -> Iterator[tuple[str, str]]:
    """The path below the package, and the text, of each module."""
    for path in sorted(HOME.rglob("*.py")):
        yield path.relative_to(HOME).as_posix(), path.read_text(encoding="utf-8")


def long_names(text: str) -> list[str]:
    """The tests of a module, those of classes included, whose names have too many words after `test`."""
    return [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and len(node.name.split("_")) - 1 > TEST_NAME_WORDS
    ]


def test_modules_stay_below_their_bound() -> None:
    """A larger one is on the list, with what it may have. One that is no longer larger leaves the list."""
    lines = {name: text.count("\n") for name, text in sources()}
    large = {name: count for name, count in lines.items() if count > MODULE_LINES}
    assert large.keys() == LARGE_MODULES.keys()
    assert {name: count for name, count in large.items() if count > LARGE_MODULES[name]} == {}


def test_classes_stay_below_their_bounds() -> None:
    """As for modules."""
    large = {
        f"{name}:{node.name}": size(node)
        for name, text in sources()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef)
        and (size(node).methods > CLASS_METHODS or size(node).attributes > CLASS_ATTRIBUTES)
    }
    assert large.keys() == LARGE_CLASSES.keys()
    for name, (methods, attributes) in LARGE_CLASSES.items():
        assert large[name].methods <= methods, name
        assert large[name].attributes <= attributes, name


def test_services_of_a_node_stay_few() -> None:
    """What runs on a node has these, and is to find nothing else by them."""
    assert len(fields(Services)) <= SERVICES


def test_names_of_tests_stay_short() -> None:
    """The suite that `nonstick.testing` has for stores of others included. What is longer goes into the docstring."""
    paths = [
        path
        for folder in (TESTS, HOME / "testing")
        for path in sorted(folder.rglob("*.py"))
        if "node_modules" not in path.parts
    ]
    assert Path(__file__) in paths
    assert HOME / "testing" / "contract" / "suite.py" in paths
    long = {path.as_posix(): long_names(path.read_text(encoding="utf-8")) for path in paths}
    assert {path: names for path, names in long.items() if names} == {}


def test_long_names_of_tests_are_found() -> None:
    """In a class and in another function too, with `async` and without; six words are not too many."""
    text = """
def test_one_two_three_four_five_six(): ...
def one_two_three_four_five_six_seven(): ...

class TestShelf:
    async def test_one_two_three_four_five_six_seven(self): ...

def suite():
    def test_seven_words_are_one_word_too_many(): ...
"""
    assert sorted(long_names(text)) == [
        "test_one_two_three_four_five_six_seven",
        "test_seven_words_are_one_word_too_many",
    ]


def test_sizes_are_counted_as_documented() -> None:
    """Fields, names on `self`, cached properties; no class constants, and no attribute of anything else."""
    text = """
class Shelf:
    width: int
    KINDS: ClassVar[int] = 3

    def __init__(self, other):
        self.books = other.books = []

    @cached_property
    def weight(self):
        return sum(self.books)
"""
    (shelf,) = ast.parse(text).body
    assert isinstance(shelf, ast.ClassDef)
    assert size(shelf) == Size(methods=2, attributes=3)
