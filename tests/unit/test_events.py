"""Events' bytes and the event ids that clients bring back."""

from __future__ import annotations

import base64
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nonstick.core.event_ids import MAX_REQUEST_ID, EventId, _mac, cursor_text, parse_cursor, parse_event_id
from nonstick.core.events import Kind, body_of, decode, draft, glimpse, kind_of
from nonstick.store import MAX_CLIP, STANDALONE, Cursor

SESSION = "0123456789abcdef0123456789abcdef"
ID = EventId(7, Cursor(9, b"\x00\x01tagtag"), "request-1")

kinds = st.sampled_from(list(Kind))
sessions = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=16, max_size=64)
requests = st.none() | st.integers(1 - 2**63, 2**63 - 1) | st.text(max_size=100)
positions = st.integers(1, 16**15 - 1)
cursors = st.builds(Cursor, positions, st.binary(min_size=8, max_size=8))
heards = st.none() | st.just(Cursor(0)) | cursors
tolds = st.just("") | st.from_regex(r"[0-9a-f]{8}", fullmatch=True)
later = st.tuples(positions, positions).map(sorted)
event_ids = later.flatmap(
    lambda places: st.builds(
        EventId,
        st.just(places[0]),
        st.builds(Cursor, st.just(places[1]), st.binary(min_size=8, max_size=8)),
        requests,
        st.none(),
        st.just(""),
        st.just(()),
    )
) | st.builds(EventId, st.just(STANDALONE), cursors, st.none(), heards, tolds, st.just(()))


@st.composite
def trailing(draw: st.DrawFn) -> EventId:
    """An event id of the standalone stream that names messages before it."""
    position = draw(positions)
    found: list[Cursor] = []
    for distance in draw(st.lists(st.integers(1, 300) | st.integers(1, 100_000), max_size=20)):
        position = (found[0].position if found else position) - distance
        if position > 0:
            found.insert(0, Cursor(position, draw(st.binary(min_size=8, max_size=8))))
    last = Cursor(found[-1].position + 1 if found else 9, b"8 bytes.")
    return EventId(STANDALONE, last, None, draw(heards), draw(tolds), tuple(found))


def kept(event_id: EventId) -> EventId:
    """What an event id still says after the wire: all but a request id that is too long."""
    long = event_id.request is not None and len(json.dumps(event_id.request)) > MAX_REQUEST_ID
    return event_id._replace(request=None) if long else event_id


# ---- events


@given(kinds, st.binary())
def test_event_keeps_kind_and_exact_body(kind: Kind, body: bytes) -> None:
    """The body of a message is kept as the exact bytes that go to the client."""
    data = draft(kind, body).data
    assert kind_of(data) is kind
    assert body_of(data) == body


@given(kinds, st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.lists(st.booleans())))
def test_json_body_is_decoded(kind: Kind, body: dict[str, object]) -> None:
    """`decode`: the JSON object in these event bytes."""
    assert decode(draft(kind, json.dumps(body).encode()).data) == body


def test_every_draft_has_its_own_tag() -> None:
    """`draft`: under a new random tag, of 8 bytes, so that no event id can be guessed."""
    tags = [draft(Kind.MESSAGE, b"same").tag for _ in range(1000)]
    assert {len(tag) for tag in tags} == {8}
    assert len(set(tags)) == len(tags)


@given(st.binary(max_size=6))
def test_unknown_event_is_passed_over(data: bytes) -> None:
    """A reader passes over a kind that it does not know; never an error (P12)."""
    known = len(data) >= 2 and data[:1] == b"1" and data[1] in set(Kind)
    assert (kind_of(data) is not None) == known


@pytest.mark.parametrize("data", [b"", b"1", b"2m{}", b"1Z{}", b"m1{}", b"\x001m"])
def test_newer_versions_event_has_no_kind(data: bytes) -> None:
    """`kind_of`: None if this version does not know it (P12)."""
    assert kind_of(data) is None


def test_one_visible_byte_tells_kinds_apart() -> None:
    """The kinds' bytes are in every log: none may change or be given to another (P12)."""
    assert {kind.name: chr(kind) for kind in Kind}.items() >= {
        "OPENED": "o",
        "MESSAGE": "m",
        "TERMINAL": "t",
        "TAKEN": "a",
        "HANGUP": "h",
        "REPLY": "r",
        "PROGRESS": "p",
        "CANCEL": "c",
        "LISTENING": "l",
        "LEFT": "x",
        "CHANGED": "d",
    }.items()


# ---- event ids


@given(event_ids, sessions)
def test_event_id_survives_the_round_trip(event_id: EventId, session: str) -> None:
    """What `seal` writes, `parse_event_id` reads, in the same session (P3)."""
    assert parse_event_id(event_id.seal(session), session) == kept(event_id)


@given(trailing(), sessions)
def test_event_id_names_the_latest_messages(event_id: EventId, session: str) -> None:
    """P9: as many as there is room for, which is for most of the last, each by the beginning of its tag."""
    parsed = parse_event_id(event_id.seal(session), session)
    assert parsed is not None
    assert parsed._replace(before=()) == event_id._replace(before=())
    count = len(parsed.before)
    assert [place.position for place in parsed.before] == [place.position for place in event_id.before][-count or 99 :]
    assert all(long.tag.startswith(short.tag) for long, short in zip(event_id.before[::-1], parsed.before[::-1]))  # noqa: B905
    near = [place for place in event_id.before if event_id.cursor.position - place.position < 0xFFFF]
    assert count >= min(len(near), 8)
    assert all(len(place.tag) >= 3 for place in parsed.before)


@given(trailing(), sessions)
def test_last_release_reads_full_event_id(event_id: EventId, session: str) -> None:
    """P12: 0.1.0 takes the part for a request's id, and gives it back, up to 128 characters of JSON."""
    part = event_id.seal(session).split(".")[4]
    text = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)).decode()
    assert len(text) <= MAX_REQUEST_ID
    assert not text or isinstance(json.loads(text), str)


@given(event_ids, sessions)
def test_event_id_fits_field_and_header(event_id: EventId, session: str) -> None:
    """It comes back in a `Last-Event-ID` header: visible ASCII, no spaces, and not too long."""
    assert re.fullmatch(r"[0-9A-Za-z._-]{1,300}", event_id.seal(session))


def test_request_id_keeps_its_type() -> None:
    """JSON-RPC: the ids 1 and "1" are two requests."""
    for request in (1, "1", "", 0, "null"):
        parsed = parse_event_id(ID._replace(request=request).seal(SESSION), SESSION)
        assert parsed is not None
        assert parsed.request == request
        assert type(parsed.request) is type(request)


def test_overlong_request_id_is_left_out() -> None:
    """`EventId.request`: none for an id of more than MAX_REQUEST_ID characters as JSON; the place is kept."""
    for length, kept_whole in ((126, True), (127, False), (129, False), (5000, False)):
        sent = ID._replace(request="x" * length)
        assert parse_event_id(sent.seal(SESSION), SESSION) == (sent if kept_whole else ID._replace(request=None))


def test_event_id_is_bound_to_session() -> None:
    """P3: also where another one begins, or ends, alike."""
    session = "0123456789abcdef0123456789abcdef01234567"
    for at in (0, 8, 16, 31, 32, 39):
        other = session[:at] + "x" + session[at + 1 :]
        assert parse_event_id(ID.seal(session), other) is None


def test_cursor_as_text_comes_back() -> None:
    """`cursor_text`: none for what is before everything."""
    for cursor in (Cursor(0), Cursor(1, b"8 bytes."), Cursor(16**15 - 1, b"")):
        assert parse_cursor(cursor_text(cursor)) == cursor
    assert cursor_text(Cursor(-1)) is None
    assert cursor_text(None) is None


@pytest.mark.parametrize("text", [None, 7, 1.25, "", ".", "1", "-1.", "1.0", "1.00 ", "x.00", "1." + "00" * 9, ["1."]])
def test_what_is_no_cursor_is_none(text: object) -> None:
    """P12: a log may say what this version does not know."""
    assert parse_cursor(text) is None


def test_beginning_of_large_event_is_enough() -> None:
    """`glimpse`: what was cut is not there; it takes no time in proportion to the event (P10)."""
    body = json.dumps({"node": "a", "request": {"x": "x" * MAX_CLIP}, "after": 1}).encode()
    for data in (draft(Kind.OPENED, body).data, draft(Kind.OPENED, body).data[:MAX_CLIP]):
        assert glimpse(data)["node"] == "a"
        assert "after" not in glimpse(data)


@given(event_ids, sessions, sessions)
def test_foreign_event_id_is_refused(event_id: EventId, session: str, other: str) -> None:
    """Never an event of another session: the id is bound to the one that it was sent in (P3)."""
    if session != other:
        assert parse_event_id(event_id.seal(session), other) is None


@given(st.data())
def test_changed_event_id_is_refused(data: st.DataObject) -> None:
    """An id that somebody made up out of a true one is none that we sent (P3)."""
    text = data.draw(event_ids).seal(SESSION)
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from("0123456789abcdefABCXYZ._- \n").filter(lambda character: character != text[at]))
    assert parse_event_id(text[:at] + other + text[at + 1 :], SESSION) is None
    assert parse_event_id(text[:at] + text[at + 1 :], SESSION) is None
    assert parse_event_id(text[:at] + other + text[at:], SESSION) is None


@given(st.text() | st.from_regex(r"1\.[0-9a-f]{1,15}\.[0-9a-f]{1,15}\.[0-9a-f]{16}\.[A-Za-z0-9_-]*\.[0-9a-f]{16}"))
def test_made_up_event_id_is_refused(text: str) -> None:
    """`parse_event_id`: None if we never sent it in this session; no text raises (P3)."""
    assert parse_event_id(text, SESSION) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1....",
        ID.seal(SESSION) + "\n",
        " " + ID.seal(SESSION),
        ID.seal(SESSION).upper(),
        "2" + ID.seal(SESSION)[1:],
        ID.seal(SESSION).rpartition(".")[0],
        "1.7.9.0001746167746167..",
        "\N{ARABIC-INDIC DIGIT ONE}" + ID.seal(SESSION)[1:],
        "1" * 100_000,
        "\ud800",
    ],
    ids=range(12),
)
def test_malformed_event_id_is_refused(text: str) -> None:
    """`parse_event_id`: None if we never sent it in this session."""
    assert parse_event_id(text, SESSION) is None


# ---- event ids that a client makes up: it has its session's id, which is the key of their hash


def forged(stream: str = "7", position: str = "9", tag: str = "00" * 8, request: str = "") -> str:
    """An event id with these parts, whose hash is right."""
    text = f"1.{stream}.{position}.{tag}.{request}"
    return f"{text}.{_mac(text, SESSION)}"


def packed(text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def test_hash_of_the_forger_is_right() -> None:
    """Else the tests below would show nothing."""
    assert forged("7", "9", ID.cursor.tag.hex(), packed('"request-1"')) == ID.seal(SESSION)


FORGED = {
    "no base64": forged(request="A"),
    "unused bits of base64": forged(request=packed("7")[:-1] + "x"),
    "no UTF-8": forged(request=packed(b"\xff\xfe")),
    "no JSON": forged(request=packed("request-1")),
    "half a text": forged(request=packed('"')),
    "space before it": forged(request=packed(" 7")),
    "null": forged(request=packed("null")),
    "true": forged(request=packed("true")),
    "object": forged(request=packed('{"a": 1}')),
    "list": forged(request=packed("[7]")),
    "nested lists": forged(request=packed("[" * 525)),
    "float": forged(request=packed("7.0")),
    "NaN": forged(request=packed("NaN")),
    "Infinity": forged(request=packed("-Infinity")),
    "huge number": forged(request=packed("9" * 100)),
    "number of 64 bits": forged(request=packed(str(2**63))),
    "negative number of 64 bits": forged(request=packed(str(-(2**63)))),
    "number that overflows": forged(request=packed("1e999")),
    "half a surrogate pair": forged(request=packed('"\\ud800"')),
    "long text": forged(request=packed(f'"{"x" * 200}"')),
    "position 0": forged(position="0"),
    "before its stream": forged(stream="9", position="8"),
    "leading zero": forged(stream="07"),
    "position 0 of the standalone stream": forged(stream="0", position="0"),
    "no cursor in the cluster log": forged(stream="0", request=packed('"here"')),
    "cursor that is a number": forged(stream="0", request=packed("7")),
}


@pytest.mark.parametrize("text", FORGED.values(), ids=FORGED)
def test_forged_event_id_is_refused(text: str) -> None:
    """`parse_event_id`: None if it is not what `seal` writes, whatever its hash; no text raises (P3)."""
    assert parse_event_id(text, SESSION) is None


@given(st.text("0123456789abcdef", min_size=1, max_size=15), st.text("0123456789abcdef", min_size=1, max_size=15),
       st.binary(max_size=300))  # fmt: skip
def test_forged_event_id_never_raises(stream: str, position: str, request: bytes) -> None:
    """No text raises; what is accepted is what `seal` would have written (P3)."""
    text = forged(stream, position, request=packed(request))
    found = parse_event_id(text, SESSION)
    assert found is None or found.seal(SESSION) == text
