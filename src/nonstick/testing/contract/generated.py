"""Random programs: of each method, in any order, what a store answers is what the model answers."""

from __future__ import annotations

from typing import Any, Final

import anyio.from_thread
import anyio.to_thread
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nonstick.store import MAX_CLIP, MAX_READ_BYTES, NEW_STREAM, Store
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.programs import (
    Action,
    Append,
    Create,
    Delete,
    Load,
    Look,
    Program,
    Read,
    Repeat,
    Step,
    Touch,
    Trim,
    Update,
    run_program,
)

__all__ = ["StoreModelContract", "check_programs", "programs"]

EXAMPLES: Final = 60
"""Programs in one run."""

SESSIONS: Final = 2
WRITERS: Final = ("", "u", "v", "w")
QUESTIONS: Final = ("q1", "q2")
REQUESTS: Final = ("r1", "r2")
NAMES: Final = ("x", "y")


_bytes = st.binary(max_size=6)
# Not `integers`, which prefers the ends and whatever numbers it finds in the code.
_places = st.sampled_from(range(41))
_value: st.SearchStrategy[bytes | None] = st.sampled_from([b"1", b"", None, b"\0\xff"])
_questions = st.sampled_from(QUESTIONS)
_requests = st.sampled_from(REQUESTS)
_extras: Final[dict[str, st.SearchStrategy[Any]]] = {
    "expect": st.lists(_questions, min_size=1, max_size=2, unique=True),
    "answers": _questions,
    "settle": _questions,
    "cancel": _requests,
    "uncancel": _requests,
    "fields": st.dictionaries(st.sampled_from(NAMES), _value, min_size=1),
}
_values: st.SearchStrategy[dict[str, bytes | None]] = st.dictionaries(st.sampled_from(NAMES), _value)


def _weighted(table: dict[str, tuple[int, st.SearchStrategy[Any]]]) -> st.SearchStrategy[Any]:
    """One of these, each as often as its weight says."""
    names = [name for name, (weight, _) in table.items() for _ in range(weight)]
    return st.sampled_from(names).flatmap(lambda name: table[name][1])


_extra = _weighted(
    {"none": (6, st.builds(dict[str, Any]))}
    | {name: (2, st.fixed_dictionaries({name: value})) for name, value in _extras.items()}
    | {
        f"{name}, fields": (1, st.fixed_dictionaries({n: _extras[n] for n in (name, "fields")}))
        for name in ("settle", "answers")
    }
)
_append_action = st.builds(
    Append,
    data=st.lists(_bytes, max_size=3),
    writer=st.sampled_from(WRITERS),
    stream=st.sampled_from([None, NEW_STREAM, NEW_STREAM, 0, 1, 2, 3]),
    attempt=st.sampled_from([0, 0, 0, 0, 0, 1, -1]),
    take_over=st.sampled_from([False, False, False, True]),
    terminal=st.sampled_from([False, False, True]),
    extra=_extra,
)
_actions: st.SearchStrategy[Action] = _weighted(
    {
        "append": (24, _append_action),
        "repeat": (6, st.builds(Repeat, st.sampled_from(WRITERS[1:]))),
        "read": (
            8,
            st.builds(
                Read,
                _places,
                st.sampled_from(["true", "true", "none", "other"]),
                st.sampled_from([1, 2, 1000]),
                st.sampled_from([1, 7, MAX_READ_BYTES]),
                st.sampled_from([None, None, 0, 3, MAX_CLIP]),
            ),
        ),
        "trim": (6, st.builds(Trim, st.lists(st.integers(0, 3), max_size=4), st.none() | _places)),
        "update": (4, st.builds(Update, _values, _values, st.sampled_from([None, 600.0]))),
        "create": (4, st.builds(Create, st.dictionaries(st.sampled_from(NAMES), _bytes))),
        "load": (3, st.just(Load())),
        "look": (
            4,
            st.builds(Look, st.sampled_from([0, 0, 0, 1, 2]), st.sampled_from(["true", "true", "none", "other"])),
        ),
        "touch": (1, st.just(Touch())),
        "delete": (2, st.builds(Delete, st.booleans())),
    }
)


def programs() -> st.SearchStrategy[Program]:
    """Programs of 10 to 40 calls; most are on one session."""
    steps = st.builds(Step, st.integers(0, 1), st.sampled_from([0, 0, 0, 0, 0, 1]), _actions)
    return st.lists(steps, min_size=10, max_size=40)


async def check_programs(a: Store, b: Store, name: str, *, examples: int = EXAMPLES, shrink: bool = True) -> None:
    """Generates programs and runs them on these two nodes, each on new sessions whose keys begin with `name`.

    Much the same programs every time. The notes of a failure's error show the program that fails; with `shrink`, the
    smallest one that fails.
    """
    runs = iter(range(1 << 32))

    async def run(program: Program) -> None:
        number = next(runs)
        await run_program(program, a, b, tuple(f"{name}-{number}-{n}" for n in range(SESSIONS)))

    # Hypothesis calls its tests synchronously: it runs in a thread, and each program comes back to this event loop.
    @settings(
        max_examples=examples,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(program=programs())
    def generated(program: Program) -> None:
        anyio.from_thread.run(run, program)

    await anyio.to_thread.run_sync(generated)


class StoreModelContract(ContractFixtures):
    """A store answers what a plain list would."""

    async def test_random_programs_answer_like_the_model(self, a: Store, b: Store, key: str) -> None:
        """Every method, in any order, from two nodes: the answers of a list, errors included (P1, P3, P4, P7)."""
        await check_programs(a, b, key)
