"""What can be set: each setting is declared once, and everything else that names settings is held to that."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any, Final, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nonstick.commands import cli, serve
from nonstick.commands.serve_options import ServeOptions
from nonstick.core.settings import OF_THE_SDK, Options, Settings, must, settings_of
from nonstick.errors import ConfigurationError

NAMES: Final = [field.name for field in fields(Settings)]
DEFAULTS: Final = {field.name: field.default for field in fields(Settings)}


async def rebuild(_: object) -> None:
    """As `rehydrate`."""


KINDS: Final[dict[str, list[Any]]] = {
    "zero or a positive, finite number of seconds": [0, 0.5, 3],
    "a positive, finite number of seconds": [0.001, 1, 1e9],
    "a positive, finite number of seconds, or None": [0.001, 1, 1e9],
    "a share, more than 0 and at most 1": [0.01, 1],
    "a positive number without a fraction": [1, 10**12, 1e3],
    "a positive number without a fraction, or None": [1, 10**12, 1e3],
    "a positive number of bytes, without a fraction": [1, 2.0**40],
    "zero or a positive number of milliseconds, without a fraction": [0, 1, 5e3],
    "True or False": [True, False],
    "a text that is not empty, or None": ["x", "with blanks"],
    "an async function that takes a Connection, or None": [rebuild],
    'names of headers, as in ["x-api-key"]': [[], ["x-api-key"], ("a", "B")],
}
"""What each kind of setting takes, beside None where it says so."""

FIT_NO_SETTING: Final[list[Any]] = [-1, -0.1, math.nan, math.inf, -math.inf, "", b"x", object(), {1: 2}, [1]]


def kinds() -> dict[str, str]:
    return {name: must(name).be for name in NAMES}


def told(name: str, value: Any) -> str:
    with pytest.raises(ConfigurationError) as refused:
        settings_of({name: value})
    return str(refused.value)


def test_options_name_every_setting() -> None:
    """Type checkers read `Options` alone."""
    types = get_type_hints(Settings)
    assert get_type_hints(Options) == {name: types[name] for name in NAMES if name not in OF_THE_SDK} | {
        "encryption_keys": get_type_hints(Options)["encryption_keys"]
    }


@pytest.mark.parametrize("name", NAMES)
def test_setting_takes_its_default(name: str) -> None:
    assert getattr(settings_of({name: DEFAULTS[name]} if name not in OF_THE_SDK else {}), name) == DEFAULTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_setting_takes_its_kind(name: str) -> None:
    kind = kinds()[name]
    values: list[Any] = kind.removeprefix("one of ").split(", ") if kind.startswith("one of ") else KINDS[kind]
    others = {"placement": "owner"} if name == "rehydrate" else {}
    for value in values:
        kept = getattr(settings_of({name: value, **others}), name)
        assert kept == (tuple(one.lower() for one in value) if name == "relay_headers" else value)
    if kind.endswith(", or None") and name not in OF_THE_SDK:
        assert getattr(settings_of({name: None}), name) is None


@pytest.mark.parametrize("name", NAMES)
def test_wrong_value_is_refused_clearly(name: str) -> None:
    """The argument is named as its door names it."""
    for value in FIT_NO_SETTING:
        message = told(name, value)
        assert message.startswith(f"{OF_THE_SDK.get(name, name)} must be {kinds()[name]}, not ")
        assert "pydantic" not in message
        assert "\n" not in message


@pytest.mark.parametrize("name", [name for name in NAMES if not must(name).be.endswith("None")])
def test_none_needs_a_meaning(name: str) -> None:
    assert told(name, None).endswith(", not None")


@pytest.mark.parametrize("name", [name for name in NAMES if "number" in must(name).be])
def test_truth_is_no_number(name: str) -> None:
    for value in (True, False):
        assert told(name, value).endswith(f", not {value}")


@pytest.mark.parametrize("name", [name for name in NAMES if must(name).be.startswith("a positive")])
def test_zero_is_no_limit(name: str) -> None:
    assert told(name, 0).endswith(", not 0")


def test_long_value_is_not_quoted() -> None:
    """It may be a key that was given under the wrong name."""
    key = "k" * 44
    for name in ("window", "placement", "node_header"):
        assert told(name, key).endswith(", not a text of 44 characters")
        assert told(name, key.encode()).endswith(", not a value of type bytes")


def test_settings_that_clash_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="what it ran on is gone"):
        settings_of({"placement": "owner", "reexecute": "idempotent"})


@pytest.mark.parametrize("name", NAMES)
def test_command_line_says_every_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or has an option there, or is refused there: nothing in between."""
    taken: list[ServeOptions] = []

    def note(options: ServeOptions) -> int:
        taken.append(options)
        return 0

    monkeypatch.setattr(serve, "serve", note)
    argument, default = OF_THE_SDK.get(name, name), DEFAULTS[name]
    text = default if must(name).said_as == "text" and default is not None else json.dumps(default)
    command = ["serve", "server.py", "--store", "memory:", "--set", f"{argument}={text}"]
    if argument in vars(ServeOptions(target="", store="")) or must(name).said_as == "nothing":
        with pytest.raises(SystemExit) as refused:
            cli.main(command)
        assert refused.value.code == 2
        return
    assert cli.main(command) == 0
    (said,) = taken[0].settings.items()
    # Only a text may be anything, so "null" is one.
    assert said == (
        argument,
        "null" if must(name).said_as == "text" and default is None else json.loads(json.dumps(default)),
    )


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists)


@given(st.sampled_from(NAMES), JSON)
def test_any_value_gets_one_verdict(name: str, value: Any) -> None:
    """Nothing else than a `ConfigurationError` comes out."""
    said = ""
    try:
        settings_of({name: value})
    except ConfigurationError as error:
        said = str(error)
    assert said == "" or said.partition(" must be ")[0] == OF_THE_SDK.get(name, name)
    assert "\n" not in said
