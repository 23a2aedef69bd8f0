"""The pages in docs/ name what there is: modules, settings, files and headings."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from nonstick.core.settings import Options, Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md")), ROOT / "deploy" / "README.md"]

GIVEN_IN_PYTHON = {"rehydrate", "encryption_keys"}
OPTIONS_OF_THE_COMMAND = {"answer", "placement", "grace", "lease"}
OF_THE_ENVIRONMENT = {"node_name"}
CALLED_OTHERWISE = {"lifetime": "session_idle_timeout"}


def slug(heading: str) -> str:
    """The anchor that GitHub gives this heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in page.read_text().splitlines() if line.startswith("#")}


def test_every_module_is_in_the_table_of_modules_once() -> None:
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


def test_every_setting_is_on_a_page_with_its_default() -> None:
    """In a table of docs/limits.md or of docs/cli.md."""
    tables = (DOCS / "limits.md").read_text() + (DOCS / "cli.md").read_text().partition("### Settings")[2]
    rows = [line.split("|")[1] for line in tables.splitlines() if line.startswith("| `")]
    listed = set(re.findall(r"`(\w+)`", " ".join(rows)))
    settings = {field.name for field in fields(Settings)} | set(Options.__optional_keys__)
    elsewhere = GIVEN_IN_PYTHON | OPTIONS_OF_THE_COMMAND | OF_THE_ENVIRONMENT
    wanted = {CALLED_OTHERWISE.get(name, name) for name in settings - elsewhere}
    assert wanted <= listed, wanted - listed


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
