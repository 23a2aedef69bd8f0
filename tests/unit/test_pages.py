"""The pages in docs/ name what there is: modules, settings, files and headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from nonstick.commands.serve_options import ServeOptions
from nonstick.core.settings import OF_THE_SDK, Settings, must

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md")), ROOT / "deploy" / "README.md"]

GIVEN_IN_PYTHON = {"rehydrate"}
OPTIONS_OF_THE_COMMAND = {"answer", "placement", "grace", "lease"}
OF_THE_ENVIRONMENT = {"node_name"}
SAID_OTHERWISE = {"namespace": "the MCP server's name"}


def slug(heading: str) -> str:
    """The anchor that GitHub gives this heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in page.read_text().splitlines() if line.startswith("#")}


def test_every_module_is_listed_once() -> None:
    """docs/design.md, "Modules": and nothing that is gone."""
    table = (DOCS / "design.md").read_text().partition("## Modules")[2]
    named = re.findall(r"`([\w/]+\.py)`", table)
    home = ROOT / "src" / "nonstick"
    there = {
        path.relative_to(home).as_posix()
        for path in home.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert sorted(named) == sorted(there)


def rows(page: str, after: str) -> Iterator[tuple[str, str]]:
    """What a page's tables have after this heading: a name, and what its row says of its default."""
    for line in (DOCS / page).read_text().partition(after)[2].splitlines():
        if line.startswith("| `"):
            first, second = re.split(r" (?<!\\)\| ", line.removeprefix("| ").removesuffix(" |"))[:2]
            names = re.findall(r"`([^`]+)`", first)
            yield from zip(names, second.split(", ", len(names) - 1), strict=len(names) > 1)


def on_page(name: str, default: Any) -> str:
    """A default as a page says it, without commas in its number."""
    kind = must(name).be
    if isinstance(default, bool | str | None):
        return f"`{default}`" if not isinstance(default, bool) else f"`{str(default).lower()}`"
    if "bytes" in kind:
        return f"{default // 1024} KiB" if default < 1024 * 1024 else f"{default // (1024 * 1024)} MiB"
    unit = " ms" if "milliseconds" in kind else " s" if "seconds" in kind else ""
    return f"{default:.10g}{unit}" if default != () else "none"


def test_every_setting_has_a_documented_default() -> None:
    """In a table of docs/limits.md or of docs/cli.md."""
    listed = dict([*rows("limits.md", "# Limits"), *rows("cli.md", "### Settings")])
    for field in fields(Settings):
        if field.name in GIVEN_IN_PYTHON | OPTIONS_OF_THE_COMMAND | OF_THE_ENVIRONMENT:
            continue
        said = listed[OF_THE_SDK.get(field.name, field.name)].replace(",", "")
        wanted = SAID_OTHERWISE.get(field.name) or on_page(field.name, field.default)
        assert re.match(rf"{re.escape(wanted)}(?![\w.])", said), (field.name, said, wanted)


def test_serve_options_are_on_their_page() -> None:
    """In the table of docs/cli.md."""
    listed = {names.split()[0]: said for names, said in rows("cli.md", "### Options")}
    for field in fields(ServeOptions):
        if field.name not in ("target", "settings", "store", "reload"):
            assert listed[f"--{field.name.replace('_', '-')}"].strip("`") == f"{field.default}".removesuffix(".0")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    """To a file of the project, and to a heading in it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        leads_to = (page.parent / path).resolve() if path else page
        assert leads_to.exists(), target
        assert not anchor or leads_to.suffix != ".md" or anchor in anchors(leads_to), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_row_has_left_its_table(page: Path) -> None:
    """A blank line ends a table: what comes after it would be shown as text."""
    lines = page.read_text().splitlines()
    for before, line, after in zip(["", *lines[:-1]], lines, [*lines[1:], ""], strict=True):
        begins = line.startswith("|") and not before.startswith("|")
        assert not begins or re.fullmatch(r"[|:\- ]+", after), line
