"""The comparison finds what it is there to find."""

from __future__ import annotations

from typing import Any

from tests.conformance.results import Known, Outcome, Scenario, compare, outcome, read_table, table

SCENARIO = Scenario("2025-11-25", "ping")


def checks(**statuses: str) -> Outcome:
    return outcome({"id": name, "status": status} for name, status in statuses.items())


def found(before: Outcome, after: Outcome | None) -> list[tuple[str, str]]:
    run = {} if after is None else {SCENARIO: after}
    return [(one.check.id, one.check.status) for one in compare({SCENARIO: before}, run)]


def test_the_same_results_make_no_difference() -> None:
    """What the SDK alone does not pass is not asked of nonstick either."""
    same = checks(a="SUCCESS", b="FAILURE", c="INFO")
    assert found(same, same) == []


def test_lost_pass_is_a_difference() -> None:
    """A warning counts: the suite's exit status would pass over it."""
    before = checks(a="SUCCESS", b="SUCCESS")
    assert found(before, checks(a="FAILURE", b="WARNING")) == [("a", "FAILURE"), ("b", "WARNING")]


def test_missing_check_is_a_difference() -> None:
    """A scenario that gives up early must not look better than one that goes on."""
    before = checks(a="SUCCESS", b="SUCCESS", c="SUCCESS")
    assert found(before, checks(a="SUCCESS", b="SKIPPED")) == [("b", "SKIPPED"), ("c", "ABSENT")]
    assert found(before, None) == [("a", "ABSENT"), ("b", "ABSENT"), ("c", "ABSENT")]


def test_failing_new_check_is_a_difference() -> None:
    """Some checks exist only to report that something went wrong."""
    assert found(checks(a="SUCCESS"), checks(a="SUCCESS", error="FAILURE")) == [("error", "FAILURE")]


def test_the_worst_of_several_occurrences_counts() -> None:
    """The suite repeats ids."""
    raw: list[dict[str, Any]] = [{"id": "a", "status": status} for status in ("SUCCESS", "FAILURE", "SUCCESS")]
    assert [check.status for check in outcome(raw).bad] == ["FAILURE"]


def test_known_difference_excuses_one_check_only() -> None:
    """An entry excuses one check of one scenario, in the columns and versions that it names."""
    known = Known("ping", "a", ("2025-11-25",), ("three",), "because")
    (difference,) = compare({SCENARIO: checks(a="SUCCESS")}, {SCENARIO: checks(a="FAILURE")})
    assert known.covers("three", difference)
    assert not known.covers("one", difference)
    assert not known._replace(check="b").covers("three", difference)
    assert not known._replace(scenario="pong").covers("three", difference)
    assert not known._replace(versions=("2025-06-18",)).covers("three", difference)


def test_the_table_shows_what_passed() -> None:
    """A scenario that only the wire format was checked of is shown as skipped. What is written can be read again."""
    skipped = outcome([{"id": "wire-schema-valid", "status": "SUCCESS"}])
    columns = {
        "one": {SCENARIO: str(checks(a="SUCCESS", b="SUCCESS")), Scenario("extension", "tasks"): str(skipped)},
        "three": {SCENARIO: str(checks(a="SUCCESS", b="FAILURE")), Scenario("kills", "nodes killed"): "9"},
    }
    text = table(columns, ["2025-11-25", "extension", "kills"])
    assert "| ping | ✓ 2 | **✗ 1 of 2** |" in text
    assert "| tasks | skipped | – |" in text
    assert "| nodes killed | – | 9 |" in text
    assert read_table(text) == columns
