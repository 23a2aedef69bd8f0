"""The contract catches what other systems shipped: each broken store here must fail the test that is meant for it."""

from __future__ import annotations

import asyncio
import inspect
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import pytest

from nonstick.errors import Diverged, Fenced, NotPending, SessionNotFound, StoreError, StreamClosed, Trimmed
from nonstick.store import (
    MAX_CLIP,
    MAX_READ_BYTES,
    STANDALONE,
    Appended,
    Batch,
    Cursor,
    Event,
    Loaded,
    News,
    Skimmed,
    Wake,
)
from nonstick.stores.memory import MemoryStore
from nonstick.testing import ManualClock, StoreContract, check_programs
from nonstick.testing.contract.checks import empty_log
from nonstick.testing.contract.reading import five_events

pytestmark = pytest.mark.anyio

CAUGHT = (AssertionError, pytest.fail.Exception, StoreError, TimeoutError)


class Sound(MemoryStore):
    """Nothing is wrong with it."""


class WritesRepeatsAgain(MemoryStore):
    async def append(self, key: str, batch: Batch) -> Appended:
        return await super().append(key, replace(batch, writer=""))


class SharesOneSequence(MemoryStore):
    async def append(self, key: str, batch: Batch) -> Appended:
        return await super().append(key, replace(batch, writer=batch.writer and "node"))


class ChecksRepeatsLast(MemoryStore):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.ended: set[tuple[str, int]] = set()

    async def append(self, key: str, batch: Batch) -> Appended:
        if (key, batch.stream) in self.ended:
            raise StreamClosed
        answer = await super().append(key, batch)
        if batch.terminal:
            self.ended.add((key, batch.stream))
        return answer


class NeverCloses(MemoryStore):
    async def append(self, key: str, batch: Batch) -> Appended:
        return await super().append(key, replace(batch, terminal=False))


class PassesOverHoles(MemoryStore):
    async def append(self, key: str, batch: Batch) -> Appended:
        try:
            return await super().append(key, batch)
        except Diverged:
            return await super().append(key, replace(batch, writer=""))


class NeverFences(MemoryStore):
    async def append(self, key: str, batch: Batch) -> Appended:
        for attempt in range(10):
            try:
                return await super().append(key, replace(batch, attempt=attempt))
            except Fenced:
                pass
        raise Fenced


class SettlesAnything(MemoryStore):
    async def append(self, key: str, batch: Batch) -> Appended:
        try:
            return await super().append(key, batch)
        except NotPending:
            return await super().append(key, replace(batch, settle=None, answers=None))


class KeepsFieldsOfRefused(MemoryStore):
    async def append(self, key: str, batch: Batch) -> Appended:
        await self.update(key, batch.fields)
        return await super().append(key, batch)


class KeepsEveryCancel(MemoryStore):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.kept: set[str] = set()

    async def append(self, key: str, batch: Batch) -> Appended:
        answer = await super().append(key, batch)
        self.kept |= {batch.cancel} if batch.cancel else set()
        return answer

    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        return (await super().load(key, renew=renew))._replace(cancels=frozenset(self.kept))


class TearsBatches(MemoryStore):
    async def append(self, key: str, batch: Batch) -> Appended:
        if batch.stream != STANDALONE or batch.writer or len(batch.events) < 2:
            return await super().append(key, batch)
        answers = []
        for draft in batch.events:
            answers.append(await super().append(key, replace(batch, events=[draft])))
            await asyncio.sleep(0)
        return answers[-1]._replace(first=answers[0].first)


class CountsPositionsFromWhatIsLeft(MemoryStore):
    async def append(self, key: str, batch: Batch) -> Appended:
        answer = await super().append(key, batch)
        return answer if answer.duplicate else answer._replace(first=answer.count - len(batch.events) + 1)


class RaisesSessionsByUpdate(MemoryStore):
    async def update(
        self,
        key: str,
        changes: Mapping[str, bytes | None],
        *,
        expect: Mapping[str, bytes | None] | None = None,
        lifetime: float | None = None,
    ) -> bool:
        try:
            return await super().update(key, changes, expect=expect, lifetime=lifetime)
        except SessionNotFound:
            await self.create(key, {name: value for name, value in changes.items() if value}, lifetime=60)
            return True


class IgnoresExpectedAbsence(MemoryStore):
    async def update(
        self,
        key: str,
        changes: Mapping[str, bytes | None],
        *,
        expect: Mapping[str, bytes | None] | None = None,
        lifetime: float | None = None,
    ) -> bool:
        present = {name: value for name, value in (expect or {}).items() if value is not None}
        return await super().update(key, changes, expect=present, lifetime=lifetime)


class GrantsALongerLifetimeOnlyOnce(MemoryStore):
    async def update(
        self,
        key: str,
        changes: Mapping[str, bytes | None],
        *,
        expect: Mapping[str, bytes | None] | None = None,
        lifetime: float | None = None,
    ) -> bool:
        before = self._sessions[key].lifetime if key in self._sessions else 0.0
        written = await super().update(key, changes, expect=expect, lifetime=lifetime)
        if written:
            self._sessions[key].lifetime = before
        return written


class RemembersTheDeleted(MemoryStore):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.cache: dict[str, Loaded] = {}

    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        try:
            self.cache[key] = await super().load(key, renew=renew)
        except SessionNotFound:
            if key not in self.cache:
                raise
        return self.cache[key]


class IgnoresTags(MemoryStore):
    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        return await super().read(key, Cursor(after.position), limit=limit, max_bytes=max_bytes)


class ReadsOnAfterALoss(MemoryStore):
    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        try:
            return await super().read(key, after, limit=limit, max_bytes=max_bytes)
        except Diverged:
            return []


class SkipsWhatWasTrimmed(MemoryStore):
    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        try:
            return await super().read(key, after, limit=limit, max_bytes=max_bytes)
        except Trimmed:
            return await super().read(key, Cursor(after.position), limit=limit, max_bytes=max_bytes)


class RepeatsTheEventAtTheCursor(MemoryStore):
    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        return await super().read(key, Cursor(max(0, after.position - 1)), limit=limit, max_bytes=max_bytes)


class ReadsByCountAlone(MemoryStore):
    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        return [skimmed.event for skimmed in await self.skim_whole(key, after, limit)]

    async def skim_whole(self, key: str, after: Cursor, limit: int) -> list[Skimmed]:
        return [Skimmed(event, len(event.data)) for event in self._after(key, after, limit)]


class ReadsNothingThatIsTooLarge(MemoryStore):
    """It stops before an event that is larger than a read alone, and never comes past it."""

    async def read(self, key: str, after: Cursor, *, limit: int = 256, max_bytes: int = MAX_READ_BYTES) -> list[Event]:
        events = await super().read(key, after, limit=limit, max_bytes=max_bytes)
        return [event for event in events if len(event.data) <= max_bytes]


class ClipsNothing(ReadsByCountAlone):
    async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
        return await self.skim_whole(key, after, limit)


class SaysTheSizeOfWhatIsLeft(MemoryStore):
    async def skim(self, key: str, after: Cursor, *, limit: int = 256, clip: int = MAX_CLIP) -> list[Skimmed]:
        found = await super().skim(key, after, limit=limit, clip=clip)
        return [Skimmed(event, len(event.data)) for event, _ in found]


class ForgetsHowLargeItsLogIs(MemoryStore):
    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        return (await super().load(key, renew=renew))._replace(size=0, count=0)


class TrimsTooMuch(MemoryStore):
    async def trim(self, key: str, *, streams: Collection[int] = (), standalone_before: int = 0) -> None:
        await super().trim(key, streams=streams, standalone_before=standalone_before and standalone_before + 1)


class ExpiresLate(MemoryStore):
    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        await super().create(key, fields, lifetime=lifetime * 1.5, limits=limits)


class RenewsAtEveryLoad(MemoryStore):
    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        await self.touch([key])
        return await super().load(key, renew=renew)


class IgnoresLimits(MemoryStore):
    async def create(
        self, key: str, fields: Mapping[str, bytes], *, lifetime: float, limits: Mapping[str, int] | None = None
    ) -> None:
        await super().create(key, fields, lifetime=lifetime)


class AnnouncesNothing(MemoryStore):
    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        return super().watch(f"{key}-other", wake)


class LeavesAWindow(MemoryStore):
    """It says nothing at the beginning, so what came just before the watch is seen too late."""

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        return super().watch(key, lambda news: wake(news) if news else None)


class NamesAnotherEntryBefore(MemoryStore):
    """Its wakes say the right events, after an entry that is not in the log."""

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        return super().watch(
            key, lambda news: wake(news and News(Cursor(news.after.position, b"another!"), news.events))
        )


class NamesNoTag(MemoryStore):
    """Its wakes name the position before their events alone, which another entry may have after a loss."""

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        return super().watch(key, lambda news: wake(news and news._replace(after=Cursor(news.after.position))))


class SaysEventsAlone(MemoryStore):
    """As stores did to 0.1: nothing tells whether these events continue a log."""

    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        return super().watch(key, lambda news: wake(news and list(news.events)))  # type: ignore[arg-type]


class KeepsCalling(MemoryStore):
    def watch(self, key: str, wake: Wake) -> Callable[[], None]:
        super().watch(key, wake)
        return lambda: None


class NeverLapses(MemoryStore):
    async def lapsed(self, nodes: Collection[str]) -> set[str]:
        return set()


class MissesWhatWasAppended(MemoryStore):
    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        return set()


class NamesEveryLog(MemoryStore):
    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        return set(places)


class ComparesPositionsAlone(MemoryStore):
    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        return await super().stale({key: Cursor(place.position) for key, place in places.items()})


class ComparesOnlyForMore(MemoryStore):
    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        heads = {key: self._sessions[key].head for key in places if key in self._sessions}
        return {key for key, place in places.items() if key not in heads or heads[key].position > place.position}


class PassesOverTheEnded(MemoryStore):
    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        return {key for key in await super().stale(places) if key in self._sessions}


class RenewsWhatItLooksAt(MemoryStore):
    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        await self.touch(list(places))
        return await super().stale(places)


class RemembersItsLooks(MemoryStore):
    """Answers a look that is asked again as before."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.told: dict[tuple[tuple[str, Cursor], ...], set[str]] = {}

    async def stale(self, places: Mapping[str, Cursor]) -> set[str]:
        asked = tuple(places.items())
        if asked not in self.told:
            self.told[asked] = await super().stale(places)
        return self.told[asked]


BROKEN: dict[type[MemoryStore], list[str]] = {
    WritesRepeatsAgain: [
        "test_repeated_append_is_written_once",
        "test_racing_repeats_are_written_once",
        "test_cancelled_and_repeated_append_lands_once",
    ],
    SharesOneSequence: ["test_other_writers_lower_number_is_written"],
    ChecksRepeatsLast: ["test_repeated_terminal_is_a_duplicate"],
    NeverCloses: ["test_nothing_follows_the_terminal", "test_racing_terminals_end_the_stream_once"],
    PassesOverHoles: ["test_gap_in_a_writers_numbers_diverges"],
    NeverFences: [
        "test_other_attempt_is_fenced",
        "test_stream_taken_over_fences_old_writer",
        "test_racing_successors_take_over_once",
    ],
    SettlesAnything: ["test_answer_that_nobody_expects_is_refused", "test_racing_replies_settle_the_request_once"],
    KeepsFieldsOfRefused: ["test_other_attempt_is_fenced", "test_nothing_follows_the_terminal"],
    KeepsEveryCancel: ["test_record_keeps_the_latest_cancels_only"],
    TearsBatches: ["test_reader_never_sees_half_a_batch"],
    CountsPositionsFromWhatIsLeft: ["test_trimmed_positions_are_never_reused"],
    RaisesSessionsByUpdate: [
        "test_update_never_brings_a_session_back",
        "test_deleted_session_is_gone_everywhere",
    ],
    GrantsALongerLifetimeOnlyOnce: ["test_update_lengthens_the_lifetime_for_good"],
    IgnoresExpectedAbsence: ["test_update_expecting_other_values_changes_nothing"],
    RemembersTheDeleted: ["test_deleted_session_is_gone_everywhere"],
    IgnoresTags: [
        "test_cursor_with_other_tag_has_diverged",
        "test_cursor_of_earlier_session_has_diverged",
        "test_cursor_at_dropped_entry_is_trimmed",
    ],
    ReadsOnAfterALoss: ["test_cursor_beyond_the_end_has_diverged", "test_empty_log_reads_as_empty"],
    SkipsWhatWasTrimmed: ["test_cursor_at_dropped_entry_is_trimmed"],
    RepeatsTheEventAtTheCursor: ["test_read_begins_after_its_cursor"],
    ReadsByCountAlone: [
        "test_read_ends_before_its_byte_bound",
        "test_large_events_are_read_in_parts",
    ],
    ReadsNothingThatIsTooLarge: [
        "test_read_ends_before_its_byte_bound",
        "test_large_events_are_read_in_parts",
    ],
    ClipsNothing: ["test_skimmed_events_are_clipped_and_sized"],
    SaysTheSizeOfWhatIsLeft: ["test_skimmed_events_are_clipped_and_sized"],
    ForgetsHowLargeItsLogIs: ["test_load_answers_the_logs_size"],
    TrimsTooMuch: ["test_trim_drops_standalone_events_before_position"],
    ExpiresLate: ["test_session_lives_exactly_its_lifetime"],
    RenewsAtEveryLoad: ["test_load_of_fresh_session_writes_nothing"],
    IgnoresLimits: [
        "test_full_group_refuses_and_evicts_nothing",
        "test_ended_session_leaves_its_group",
    ],
    AnnouncesNothing: [
        "test_append_wakes_watchers_on_every_node",
        "test_follower_begins_where_it_is_told",
        "test_session_end_wakes_its_followers",
    ],
    LeavesAWindow: ["test_watch_first_says_read", "test_follower_begins_where_it_is_told"],
    NamesAnotherEntryBefore: ["test_news_names_the_entry_before"],
    NamesNoTag: ["test_news_names_the_entry_before", "test_news_names_a_dropped_entry_too"],
    SaysEventsAlone: ["test_append_wakes_watchers_on_every_node"],
    KeepsCalling: ["test_stopped_watch_is_never_called"],
    NeverLapses: ["test_lease_lapses_by_the_stores_clock"],
    MissesWhatWasAppended: ["test_log_with_more_is_named", "test_many_logs_are_told_apart"],
    NamesEveryLog: ["test_quiet_logs_are_not_named", "test_many_logs_are_told_apart"],
    ComparesPositionsAlone: ["test_place_in_lost_log_is_named"],
    ComparesOnlyForMore: ["test_place_in_lost_log_is_named"],
    PassesOverTheEnded: ["test_ended_session_is_named", "test_expired_session_is_named"],
    RenewsWhatItLooksAt: ["test_expired_session_is_named"],
    RemembersItsLooks: ["test_log_with_more_is_named", "test_acknowledged_append_makes_logs_stale"],
}

BY_THE_MODEL: list[type[MemoryStore]] = [
    WritesRepeatsAgain,
    SharesOneSequence,
    NeverCloses,
    NeverFences,
    SettlesAnything,
    KeepsFieldsOfRefused,
    CountsPositionsFromWhatIsLeft,
    RaisesSessionsByUpdate,
    IgnoresExpectedAbsence,
    RemembersTheDeleted,
    IgnoresTags,
    ReadsOnAfterALoss,
    SkipsWhatWasTrimmed,
    ReadsByCountAlone,
    ReadsNothingThatIsTooLarge,
    ClipsNothing,
    SaysTheSizeOfWhatIsLeft,
    ForgetsHowLargeItsLogIs,
    TrimsTooMuch,
    MissesWhatWasAppended,
    NamesEveryLog,
    ComparesPositionsAlone,
    ComparesOnlyForMore,
    PassesOverTheEnded,
]
"""Those whose fault needs neither time nor concurrency nor a watcher to be seen."""


async def run(name: str, kind: type[MemoryStore]) -> None:
    """Runs one test of the contract on a new store of this kind, as pytest would."""
    clock = ManualClock()
    key = secrets.token_hex(16)
    async with kind(clock=clock) as store:
        test = getattr(StoreContract(), name)
        given: dict[str, object] = {"a": store, "b": store, "key": key, "clock": clock, "clip": 3}
        wanted = inspect.signature(test).parameters
        if "log" in wanted:
            given["log"] = await empty_log(store, key)
        if "five" in wanted:
            given["five"] = await five_events(store, key)
        await test(**{one: given[one] for one in wanted})


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for in vain is not waited for long: everything here is in memory."""
    monkeypatch.setattr("nonstick.testing.contract.tools.DEADLINE", 0.3)


CASES = [pytest.param(kind, name, id=f"{kind.__name__}-{name}") for kind, names in BROKEN.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), CASES)
async def test_contract_catches_the_broken_store(kind: type[MemoryStore], name: str) -> None:
    """A suite that cannot fail proves nothing."""
    with pytest.raises(CAUGHT):
        await run(name, kind)


@pytest.mark.parametrize("name", sorted({name for names in BROKEN.values() for name in names}))
async def test_contract_passes_the_sound_store(name: str) -> None:
    """What catches the broken stores is their fault, not the way in which these tests are run."""
    await run(name, Sound)


@pytest.mark.parametrize("kind", BY_THE_MODEL)
async def test_model_catches_the_broken_store(kind: type[MemoryStore]) -> None:
    """Random programs find these faults without a test that was written for them."""
    async with kind() as store:
        with pytest.raises((*CAUGHT, BaseExceptionGroup)):
            await check_programs(store, store, "key", examples=1000, shrink=False)


async def test_model_passes_the_sound_store() -> None:
    """And they find none where there is none."""
    async with Sound() as store:
        await check_programs(store, store, "key", shrink=False)
