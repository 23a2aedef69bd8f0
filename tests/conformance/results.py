"""What a run of the suite found, how it compares with the SDK's own transport, and the table of both. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

__all__ = [
    "Cells",
    "Check",
    "Difference",
    "Known",
    "Outcome",
    "Run",
    "Scenario",
    "compare",
    "outcome",
    "read_table",
    "table",
]

BAD: Final = frozenset({"FAILURE", "WARNING"})


class Scenario(NamedTuple):
    """A scenario at one version of the protocol (or "extension")."""

    version: str
    name: str


class Check(NamedTuple):
    """One check: its id, its worst status, and what was wrong."""

    id: str
    status: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One scenario's checks, one for each id."""

    checks: Mapping[str, Check] = field(default_factory=dict[str, Check])

    @property
    def bad(self) -> list[Check]:
        return [check for check in self.checks.values() if check.status in BAD]

    @property
    def good(self) -> list[Check]:
        return [check for check in self.checks.values() if check.status == "SUCCESS"]

    @property
    def skipped(self) -> bool:
        """Whether nothing but the wire format was looked at."""
        return not self.bad and all(check.id == "wire-schema-valid" for check in self.good)

    def __str__(self) -> str:
        if self.bad:
            return f"**✗ {len(self.bad)} of {len(self.bad) + len(self.good)}**"
        return "skipped" if self.skipped else f"✓ {len(self.good)}"


Run = Mapping[Scenario, Outcome]

Cells = Mapping[Scenario, str]
"""A column of the table."""

_RANK: Final = {"FAILURE": 4, "WARNING": 3, "SUCCESS": 2, "SKIPPED": 1, "INFO": 0}


def outcome(checks: Iterable[Mapping[str, Any]]) -> Outcome:
    """The outcome in a scenario's `checks.json`. Where an id occurs more than once, the worst occurrence counts."""
    worst: dict[str, Check] = {}
    for raw in checks:
        check = Check(str(raw["id"]), str(raw["status"]), str(raw.get("errorMessage") or ""))
        before = worst.get(check.id)
        if before is None or _RANK.get(check.status, 4) > _RANK.get(before.status, 4):
            worst[check.id] = check
    return Outcome(worst)


class Difference(NamedTuple):
    """A check that the SDK's own transport passes and this run does not."""

    scenario: Scenario
    check: Check

    def __str__(self) -> str:
        said = self.check.message or "not checked"
        return f"{self.scenario.version} {self.scenario.name}: {self.check.id}: {self.check.status}: {said}"


class Known(NamedTuple):
    """A difference that is meant: the scenario, its check, the columns in which it occurs, and why."""

    scenario: str
    check: str
    versions: tuple[str, ...]
    columns: tuple[str, ...]
    reason: str

    def covers(self, column: str, difference: Difference) -> bool:
        return (
            column in self.columns
            and difference.scenario.name == self.scenario
            and difference.scenario.version in self.versions
            and difference.check.id == self.check
        )


def compare(baseline: Run, run: Run) -> list[Difference]:
    """Every check that passed in `baseline` and not in `run`: failed, warned about, or not made at all."""
    found: list[Difference] = []
    for scenario, before in baseline.items():
        after = run.get(scenario, Outcome())
        for check in before.good:
            now = after.checks.get(check.id, Check(check.id, "ABSENT"))
            if now.status != "SUCCESS":
                found.append(Difference(scenario, now))
        # A check that the baseline did not get to make counts too, when it fails here.
        found += [Difference(scenario, check) for check in after.bad if check.id not in before.checks]
    return found


def table(columns: Mapping[str, Cells], versions: Sequence[str]) -> str:
    """A Markdown table for each version: scenario by column. A scenario that a column does not have is a dash."""
    parts: list[str] = []
    for version in versions:
        rows = dict.fromkeys(
            scenario for cells in columns.values() for scenario in cells if scenario.version == version
        )
        parts += [f"### {version}", "", "| scenario | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            cells = (column.get(row, "–") for column in columns.values())
            parts.append(f"| {row.name} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def read_table(text: str) -> dict[str, Cells]:
    """The columns that `table` has written into this text."""
    columns: dict[str, dict[Scenario, str]] = {}
    version, names = "", list[str]()
    for line in text.splitlines():
        first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("### "):
            version = line.removeprefix("### ")
        elif first == "scenario":
            names = rest
        elif rest and not line.startswith("|---"):
            for name, cell in zip(names, rest, strict=True):
                columns.setdefault(name, {})
                if cell != "–":
                    columns[name][Scenario(version, first)] = cell
    return dict(columns)
