"""What the encrypting wrapper detects, and how its keys change. The contract is tested in `tests/contract`."""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from nonstick import EncryptedStore
from nonstick.errors import ConfigurationError, Undecryptable
from nonstick.store import NEW_STREAM, Batch, Cursor, Draft, Event, Loaded, News
from nonstick.stores.encrypted.keys import PLAINTEXT, KeyRing, keys_from
from nonstick.stores.memory import MemoryStore

pytestmark = pytest.mark.anyio

OLD, NEW, OTHER = (secrets.token_bytes(32) for _ in range(3))
ALICE, BOB = "a" * 40, "b" * 40


def name_of(key: bytes) -> str:
    return KeyRing([key]).names[0]


def draft(data: bytes) -> Draft:
    return Draft(secrets.token_bytes(8), data)


class Readable(MemoryStore):
    """A store that somebody can look into, and write to, behind nonstick's back."""

    def fields_of(self, key: str) -> dict[str, bytes]:
        return self._sessions[key].fields

    def events_of(self, key: str) -> dict[int, Event]:
        return self._sessions[key].events


async def written(inner: Readable, key: str = ALICE, *, keys: Sequence[str | bytes] = (OLD,)) -> EncryptedStore:
    """A store with a session: two fields, three events on the standalone stream by one writer, a stream of two."""
    store = EncryptedStore(inner, keys)
    await store.create(key, {"x": b"one", "y": b"two"}, lifetime=60)
    for n in (1, 2, 3):
        await store.append(key, Batch([draft(b"event %d" % n)], writer="w", sequence=n))
    await store.append(key, Batch([draft(b"opened"), draft(b"said")], stream=NEW_STREAM, writer="s", sequence=1))
    return store


async def tampered(inner: Readable, change: Callable[[list[Event]], list[Event]]) -> EncryptedStore:
    """The session with its log as somebody with access to the store rewrote it."""
    store = await written(inner)
    events = inner.events_of(ALICE)
    changed = change(list(events.values()))
    events.clear()
    events.update({event.position: event for event in changed})
    return store


def exchanged(one: int, other: int, *names: str) -> Callable[[list[Event]], list[Event]]:
    """Exchanges these parts of two events."""

    def exchange(events: list[Event]) -> list[Event]:
        a, b = events[one - 1], events[other - 1]
        events[one - 1] = a._replace(**{name: getattr(b, name) for name in names})
        events[other - 1] = b._replace(**{name: getattr(a, name) for name in names})
        return events

    return exchange


def moved(position: int, stream: int) -> Callable[[list[Event]], list[Event]]:
    """Puts an event into another stream."""

    def move(events: list[Event]) -> list[Event]:
        events[position - 1] = events[position - 1]._replace(stream=stream)
        return events

    return move


def repeated(events: list[Event]) -> list[Event]:
    """Puts the first event into the next one's place too."""
    events[1] = events[0]._replace(position=2)
    return events


def flipped(events: list[Event]) -> list[Event]:
    data = events[1].data
    events[1] = events[1]._replace(data=data[:-1] + bytes((data[-1] ^ 1,)))
    return events


def cut(events: list[Event]) -> list[Event]:
    events[1] = events[1]._replace(data=events[1].data[:30])
    return events


TAMPERINGS = {
    "two events' data": exchanged(1, 3, "data"),
    "two events of a writer, whole": exchanged(1, 3, "data", "tag"),
    "events of two streams": exchanged(2, 4, "data", "tag"),
    "the events of a batch": exchanged(4, 5, "data", "tag"),
    "two events' tags": exchanged(1, 3, "tag"),
    "an event that is repeated": repeated,
    "an event into a stream": moved(3, 4),
    "an event out of its stream": moved(5, 0),
    "a flipped bit": flipped,
    "a cut": cut,
}


@pytest.mark.parametrize("change", TAMPERINGS.values(), ids=TAMPERINGS.keys())
async def test_changed_log_is_never_passed_over(change: Callable[[list[Event]], list[Event]]) -> None:
    """P13: an event is bound to its session, stream, tag, writer, sequence and index."""
    store = await tampered(Readable(), change)
    with pytest.raises(Undecryptable):
        await store.read(ALICE, Cursor(0))


async def test_untouched_log_is_read() -> None:
    """The counterpart: nothing of the above is refused by itself."""
    store = await tampered(Readable(), lambda events: events)
    assert [event.data for event in await store.read(ALICE, Cursor(0))] == [
        b"event 1",
        b"event 2",
        b"event 3",
        b"opened",
        b"said",
    ]


async def test_events_of_another_session_are_refused() -> None:
    """P13: the same log under another session's key does not decrypt."""
    inner = Readable()
    await written(inner, ALICE)
    store = await written(inner, BOB)
    inner.events_of(BOB).update(inner.events_of(ALICE))
    with pytest.raises(Undecryptable):
        await store.read(BOB, Cursor(0))


async def test_misplaced_fields_are_refused() -> None:
    """P13: a field is bound to its session and its name."""
    inner = Readable()
    store = await written(inner, ALICE)
    await written(inner, BOB)
    mine, others = inner.fields_of(ALICE), inner.fields_of(BOB)
    for data in (others["x"], mine["y"]):
        inner.fields_of(ALICE)["x"] = data
        with pytest.raises(Undecryptable):
            await store.load(ALICE)
        assert not await store.update(ALICE, {"z": b""}, expect={"x": b"one" if data is others["x"] else b"two"})


async def test_another_deployment_cannot_read() -> None:
    """P13: what one deployment wrote does not decrypt in another one, though they share their keys."""
    inner = Readable()
    await written(inner)
    with pytest.raises(Undecryptable):
        await EncryptedStore(inner, [OLD], deployment="another").load(ALICE)


async def test_error_names_but_shows_no_key(caplog: pytest.LogCaptureFixture) -> None:
    """An operator learns which key is missing, from the error and from the log."""
    inner = Readable()
    await written(inner)
    store = EncryptedStore(inner, [NEW])
    for read in (store.load(ALICE), store.read(ALICE, Cursor(0))):
        with pytest.raises(Undecryptable, match=name_of(OLD)):
            await read
    assert name_of(OLD) in caplog.text
    assert name_of(NEW) in caplog.text
    shown = caplog.text + repr(store)
    assert not any(key.hex() in shown or base64.b64encode(key).decode() in shown for key in (OLD, NEW))


async def test_nothing_is_kept_in_clear() -> None:
    """P13: nor does the log show that the same was said twice."""
    inner = Readable()
    await written(inner)
    kept = [*inner.fields_of(ALICE).values(), *(event.data for event in inner.events_of(ALICE).values())]
    assert not any(word in data for data in kept for word in (b"one", b"two", b"event", b"opened", b"said"))
    store = await written(inner, BOB)
    assert inner.fields_of(ALICE)["x"] != inner.fields_of(BOB)["x"]
    await store.append(BOB, Batch([draft(b"event 1")]))
    again, first = inner.events_of(BOB)[6], inner.events_of(BOB)[1]
    assert again.data[-23:] != first.data[-23:]


async def test_encrypted_store_wakes_without_news() -> None:
    """P14: a ciphertext does not tell where it stands in the log: heard again one place later, it would decrypt too."""
    inner = Readable()
    store = await written(inner)
    woken: asyncio.Queue[Any] = asyncio.Queue()
    store.watch(ALICE, woken.put_nowait)
    async with asyncio.timeout(60):
        assert await woken.get() is None
        await store.append(ALICE, Batch([draft(b"news")]))
        assert await woken.get() is None
        last = inner.events_of(ALICE)[6]
        again = last._replace(position=7)
        inner._watches.announce(ALICE, News(last.cursor, [again]))
        assert await woken.get() is None
    assert (await store.read(ALICE, last.cursor)) == []


# ---- keys


async def test_keys_are_rotated_and_records_follow() -> None:
    """A record is written again under the first key when it is loaded: the old key can go, though the session stays."""
    inner = Readable()
    store = await written(inner)
    store.use([OLD, NEW])
    assert (await store.load(ALICE)).fields == {"x": b"one", "y": b"two"}
    ahead = EncryptedStore(inner, [NEW, OLD])
    await ahead.append(ALICE, Batch([draft(b"newer")]))
    assert (await store.read(ALICE, Cursor(0)))[-1].data == b"newer"
    assert (await ahead.load(ALICE)).fields == {"x": b"one", "y": b"two"}
    ahead.use([NEW])
    assert (await ahead.load(ALICE)).fields == {"x": b"one", "y": b"two"}
    assert (await ahead.read(ALICE, Cursor(5)))[-1].data == b"newer"
    with pytest.raises(Undecryptable, match=name_of(OLD)):
        await ahead.read(ALICE, Cursor(0))


async def test_encryption_starts_for_open_sessions() -> None:
    """From `PLAINTEXT` to a key by the same steps as from one key to the next, and back not by accident."""
    inner = Readable()
    store = await written(inner, keys=[PLAINTEXT])
    assert inner.fields_of(ALICE)["x"] == b"one"
    store.use([PLAINTEXT, OLD])
    assert (await store.load(ALICE)).fields["x"] == b"one"
    store.use([OLD, PLAINTEXT])
    assert (await store.read(ALICE, Cursor(0)))[0].data == b"event 1"
    assert (await store.load(ALICE)).fields["x"] == b"one"
    assert inner.fields_of(ALICE)["x"] != b"one"
    store.use([OLD])
    assert (await store.load(ALICE)).fields["x"] == b"one"
    with pytest.raises(Undecryptable, match="not encrypted"):
        await store.read(ALICE, Cursor(0))


class Meddling(Readable):
    """Between the load and the write of a compare-and-set, somebody else writes."""

    def __init__(self) -> None:
        super().__init__()
        self.meddle: list[Mapping[str, bytes | None]] = []

    async def load(self, key: str, *, renew: bool = True) -> Loaded:
        loaded = await super().load(key, renew=renew)
        if self.meddle:
            await super().update(key, self.meddle.pop())
        return loaded


async def test_compare_and_set_holds_between_writes() -> None:
    """`update` is atomic: another value makes it fail, the same value in another ciphertext does not."""
    inner = Meddling()
    store = await written(inner, keys=[OLD, NEW])
    ring = KeyRing([OLD])

    def sealed(value: bytes) -> dict[str, bytes | None]:
        return {"x": ring.seal(ALICE, b"field x", value)}

    inner.meddle = [sealed(b"another")]
    assert not await store.update(ALICE, {"x": b"mine"}, expect={"x": b"one"})
    inner.meddle = [sealed(b"another")]
    assert await store.update(ALICE, {"x": b"mine"}, expect={"x": b"another"})
    assert (await store.load(ALICE)).fields["x"] == b"mine"
    # With one key the store compares by itself.
    inner.meddle = [{"x": b"never"}]
    store.use([OLD])
    assert await store.update(ALICE, {"x": b"two"}, expect={"x": b"mine"})
    assert not await store.update(ALICE, {"x": b"three"}, expect={"x": b"mine"})
    assert inner.meddle


@pytest.mark.parametrize(
    "keys", [[], "x" * 44, ["short"], [b"short"], [base64.b64encode(bytes(31)).decode()], ["!" * 44]], ids=repr
)
def test_what_is_no_key_is_refused(keys: Any) -> None:
    with pytest.raises(ConfigurationError) as refused:
        KeyRing(keys)
    assert "short" not in str(refused.value)


def test_keys_come_in_either_alphabet() -> None:
    key = b"\xfb\xff" * 16
    both = [base64.b64encode(key).decode(), base64.urlsafe_b64encode(key).decode().rstrip("=")]
    assert KeyRing(both).names == [name_of(key)]
    assert keys_from({"NONSTICK_ENCRYPTION_KEYS": ",\n ".join(both)}) == both
    assert keys_from({}) is None
    with pytest.raises(ConfigurationError, match="NONSTICK_ENCRYPTION_KEYS"):
        keys_from({"NONSTICK_ENCRYPTION_KEYS": " "})


async def test_made_up_keys_fill_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """P10: whoever can write to the store may name any number of them."""
    inner = MemoryStore()
    store = EncryptedStore(inner, [NEW])
    await inner.create(ALICE, {}, lifetime=60)
    for number in range(300):
        await inner.append(ALICE, Batch([draft(b"\0NE1" + number.to_bytes(4) + bytes(80))]))
        with pytest.raises(Undecryptable):
            await store.read(ALICE, Cursor(number))
    assert len(store._sealer.told) == len(caplog.records) == 100
