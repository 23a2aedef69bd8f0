-- The tables, then every statement by name. A session's rows carry its `id`, which is never given out twice: once the
-- row in `session` is gone, what is left under the id is invisible, and is swept in small pieces.

-- name: schema
CREATE TABLE IF NOT EXISTS meta (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    boot TEXT NOT NULL,        -- the boot of the machine in which `shift` holds
    shift REAL NOT NULL,       -- the store's clock is the machine's, plus this
    keeper TEXT NOT NULL,      -- the process that purges and checkpoints
    kept_until REAL NOT NULL,
    pinged_at REAL NOT NULL
);
INSERT OR IGNORE INTO meta VALUES (1, '', 0, '', 0, 0);

CREATE TABLE IF NOT EXISTS session (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    lifetime REAL NOT NULL,
    expires_at REAL NOT NULL,
    tidied_at REAL NOT NULL,
    head INTEGER NOT NULL DEFAULT 0,
    tag BLOB NOT NULL DEFAULT x'',
    size INTEGER NOT NULL DEFAULT 0,
    count INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS session_expires ON session (expires_at);

CREATE TABLE IF NOT EXISTS field (
    session INTEGER NOT NULL, name TEXT NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (session, name)
) WITHOUT ROWID;

-- AUTOINCREMENT: ids follow the order of commits (there is one writer at a time) and are never given out again, so
-- that "after the last id that I saw" misses nothing.
CREATE TABLE IF NOT EXISTS event (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    session INTEGER NOT NULL, position INTEGER NOT NULL,
    tag BLOB NOT NULL, stream INTEGER NOT NULL, data BLOB NOT NULL,
    UNIQUE (session, position)
);

CREATE TABLE IF NOT EXISTS stream (
    session INTEGER NOT NULL, stream INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    last INTEGER NOT NULL,     -- position of its last event once it is closed, else 0
    PRIMARY KEY (session, stream)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS written (
    session INTEGER NOT NULL, writer TEXT NOT NULL, sequence INTEGER NOT NULL,
    first INTEGER NOT NULL, stream INTEGER NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (session, writer, sequence)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS pending (
    session INTEGER NOT NULL, request TEXT NOT NULL,
    PRIMARY KEY (session, request)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS cancel (
    session INTEGER NOT NULL, request TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (session, request)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS member (
    session INTEGER NOT NULL, name TEXT NOT NULL,
    PRIMARY KEY (session, name)
) WITHOUT ROWID;

-- How many sessions a group holds, expired ones that are not purged yet included.
CREATE TABLE IF NOT EXISTS tally (name TEXT PRIMARY KEY, members INTEGER NOT NULL) WITHOUT ROWID;

-- Sessions that ended: `ended` tells the watchers and is kept for a while, `grave` is what is still to be swept.
CREATE TABLE IF NOT EXISTS ended (id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS grave (session INTEGER PRIMARY KEY);

CREATE TABLE IF NOT EXISTS node (name TEXT PRIMARY KEY, expires_at REAL NOT NULL) WITHOUT ROWID;

-- name: create
INSERT INTO session (key, lifetime, expires_at, tidied_at) VALUES (?, ?, ?, ?);
-- name: find
SELECT id, expires_at FROM session WHERE key = ?;
-- name: load
SELECT s.expires_at, s.lifetime, s.head, s.tag, s.size, s.count, f.name, f.value
FROM session s LEFT JOIN field f ON f.session = s.id
WHERE s.key = ? AND s.expires_at > ?
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, c.request, NULL
FROM session s CROSS JOIN cancel c ON c.session = s.id
WHERE s.key = ? AND c.at > ?;
-- name: renew
UPDATE session SET expires_at = ? + lifetime WHERE key = ? AND expires_at > ?;
-- name: prolong
UPDATE session SET lifetime = ?, expires_at = ? WHERE id = ?;
-- name: head
SELECT id, head, tag, size, count, tidied_at FROM session WHERE key = ? AND expires_at > ?;

-- name: get_field
SELECT value FROM field WHERE session = ? AND name = ?;
-- name: set_field
INSERT INTO field VALUES (?, ?, ?) ON CONFLICT (session, name) DO UPDATE SET value = excluded.value;
-- name: remove_field
DELETE FROM field WHERE session = ? AND name = ?;

-- name: tally
SELECT members FROM tally WHERE name = ?;
-- name: join
INSERT INTO member VALUES (?, ?);
-- name: count_in
INSERT INTO tally VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET members = members + 1;
-- name: count_out
UPDATE tally SET members = members - 1 WHERE name IN (SELECT name FROM member WHERE session = ?);
-- name: remove_empty_groups
DELETE FROM tally WHERE members <= 0 AND name IN (SELECT name FROM member WHERE session = ?);
-- name: leave
DELETE FROM member WHERE session = ?;

-- name: latest_written
SELECT sequence, first, stream FROM written WHERE session = ? AND writer = ? ORDER BY sequence DESC LIMIT 1;
-- name: first_written
SELECT first FROM written WHERE session = ? AND writer = ? AND sequence >= ? ORDER BY sequence LIMIT 1;
-- name: write
INSERT INTO written VALUES (?, ?, ?, ?, ?, ?);
-- name: forget_written
DELETE FROM written WHERE session = ? AND at <= ?
AND NOT EXISTS (SELECT 1 FROM stream s WHERE s.session = written.session AND s.stream = written.stream);

-- name: get_stream
SELECT attempt, last FROM stream WHERE session = ? AND stream = ?;
-- name: open_stream
INSERT INTO stream VALUES (?, ?, ?, ?);
-- name: set_stream
UPDATE stream SET attempt = ?, last = ? WHERE session = ? AND stream = ?;
-- name: remove_stream
DELETE FROM stream WHERE session = ? AND stream = ?;

-- name: is_pending
SELECT 1 FROM pending WHERE session = ? AND request = ?;
-- name: expect
INSERT OR IGNORE INTO pending VALUES (?, ?);
-- name: settle
DELETE FROM pending WHERE session = ? AND request = ?;

-- name: cancel
INSERT INTO cancel VALUES (?, ?, ?) ON CONFLICT (session, request) DO UPDATE SET at = excluded.at;
-- name: uncancel
DELETE FROM cancel WHERE session = ? AND request = ?;
-- name: drop_cancels
DELETE FROM cancel WHERE session = ? AND request <> ? AND request NOT IN
(SELECT request FROM cancel WHERE session = ? AND request <> ? ORDER BY at DESC LIMIT ?);
-- name: forget_cancels
DELETE FROM cancel WHERE session = ? AND at <= ?;

-- name: add_event
INSERT INTO event (session, position, tag, stream, data) VALUES (?, ?, ?, ?, ?);
-- name: set_head
UPDATE session SET head = ?, tag = ?, size = ?, count = ? WHERE id = ?;
-- name: set_tidied
UPDATE session SET tidied_at = ? WHERE id = ?;
-- name: read
SELECT s.head, e.position, e.tag, e.stream, CASE WHEN e.position > ? THEN e.data END
FROM session s LEFT JOIN event e ON e.session = s.id AND e.position >= ?
WHERE s.key = ? AND s.expires_at > ?
ORDER BY e.position LIMIT ?;

-- name: skim
SELECT s.head, e.position, e.tag, e.stream, coalesce(substr(e.data, 1, ?), x''), length(e.data)
FROM session s LEFT JOIN event e ON e.session = s.id AND e.position >= ?
WHERE s.key = ? AND s.expires_at > ?
ORDER BY e.position LIMIT ?;

-- name: place
SELECT head, tag FROM session WHERE key = ? AND expires_at > ?;

-- name: measure_range
SELECT count(*), coalesce(sum(length(data)), 0) FROM event
WHERE session = ? AND position BETWEEN ? AND ? AND stream = ?;
-- name: remove_range
DELETE FROM event WHERE session = ? AND position BETWEEN ? AND ? AND stream = ?;
-- name: shrink
UPDATE session SET count = count - ?, size = size - ? WHERE id = ?;

-- name: bury
DELETE FROM session WHERE id = ?;
-- name: note_end
INSERT INTO ended (key, at) VALUES (?, ?);
-- name: dig
INSERT INTO grave VALUES (?);
-- name: graves
SELECT session FROM grave LIMIT 1;
-- name: fill
DELETE FROM grave WHERE session = ?;
-- name: expired
SELECT id, key FROM session WHERE expires_at <= ? ORDER BY expires_at LIMIT ?;
-- name: sweep_events
DELETE FROM event WHERE id IN (SELECT id FROM event WHERE session = ? LIMIT ?);
-- name: sweep_written
DELETE FROM written WHERE (session, writer, sequence) IN
(SELECT session, writer, sequence FROM written WHERE session = ? LIMIT ?);
-- name: sweep_streams
DELETE FROM stream WHERE session = ?;
-- name: sweep_fields
DELETE FROM field WHERE session = ?;
-- name: sweep_pending
DELETE FROM pending WHERE session = ?;
-- name: sweep_cancels
DELETE FROM cancel WHERE session = ?;
-- name: forget_ended
DELETE FROM ended WHERE at <= ?;
-- name: forget_nodes
DELETE FROM node WHERE expires_at <= ?;
-- name: untidy
SELECT EXISTS (SELECT 1 FROM session WHERE expires_at <= ?) OR EXISTS (SELECT 1 FROM grave)
OR EXISTS (SELECT 1 FROM ended WHERE at <= ?) OR EXISTS (SELECT 1 FROM node WHERE expires_at <= ?);

-- name: last_ids
SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'event'), 0),
       coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'ended'), 0);
-- name: new_events
SELECT e.id, s.key, before.tag, e.position, e.tag, e.stream, e.data
FROM event e CROSS JOIN session s ON s.id = e.session
LEFT JOIN event before ON before.session = e.session AND before.position = e.position - 1
WHERE e.id > ? AND e.id <= ? AND watched(s.key)
ORDER BY e.id LIMIT ?;
-- name: new_ends
SELECT key FROM ended WHERE id > ? AND id <= ?;

-- name: grant
INSERT INTO node VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET expires_at = excluded.expires_at;
-- name: release
DELETE FROM node WHERE name = ?;
-- name: live_nodes
SELECT name FROM node WHERE expires_at > ?;

-- name: ping
UPDATE meta SET pinged_at = ?;
-- name: clock
SELECT boot, shift FROM meta;
-- name: set_clock
UPDATE meta SET boot = ?, shift = ?;
-- name: latest_renewal
SELECT coalesce(max(expires_at - lifetime), 0) FROM session;
-- name: keep
UPDATE meta SET keeper = ?, kept_until = ? WHERE keeper IN (?, '') OR kept_until <= ?;
-- name: stop_keeping
UPDATE meta SET keeper = '', kept_until = 0 WHERE keeper = ?;
