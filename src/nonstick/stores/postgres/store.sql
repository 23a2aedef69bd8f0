-- Tables and functions, version 1. Before it runs, `nonstick.` becomes the deployment's schema, the words in capitals
-- with an underscore the constants of store.py, and, if the store is to be unlogged, every table but `meta` is.
--
-- Rules that every function keeps:
--   * Called alone, in autocommit: one call is one transaction and one round trip. Nothing outlives it in the server's
--     session (no temporary table, setting, session lock or cursor), so that a transaction-pooling PgBouncer may stand
--     between.
--   * Whoever writes to a session locks its row first. Appends to one session are therefore one after the other, also
--     their commits: positions have no gaps, and no reader sees a later one without the earlier.
--   * Time is clock_timestamp(), asked for once the lock is held. now() is when the transaction began to wait.
--   * What is refused is answered, not raised: an error would fill the server's log.
--   * No deadlocks: locks are waited for in the order session (by id), expiry, tally (by grp, slot), or not at all.
-- Times are seconds since 1970, by the server's clock.

CREATE TABLE nonstick.meta (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    version int NOT NULL,
    oldest int NOT NULL, -- code that knows only the versions up to one before this cannot use the schema
    pinged_at float8 NOT NULL DEFAULT 0
) WITH (fillfactor = 10);

-- Its indexed columns never change, and its pages keep room: renewals and appends are HOT updates, which touch no
-- index. That is why there is no index on expires_at; `expiry` takes its place.
CREATE TABLE nonstick.session (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key text COLLATE "C" NOT NULL UNIQUE,
    lifetime float8 NOT NULL,
    expires_at float8 NOT NULL,
    head bigint NOT NULL DEFAULT 0,
    tag bytea NOT NULL DEFAULT '',
    size bigint NOT NULL DEFAULT 0,
    count bigint NOT NULL DEFAULT 0,
    tidied_at float8 NOT NULL
) WITH (fillfactor = 70);

-- When to look next whether a session has expired: never later than it does, and moved on by that look alone. So a
-- session costs this index one change per lifetime, however often it is renewed.
CREATE TABLE nonstick.expiry (
    session bigint PRIMARY KEY,
    due float8 NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX ON nonstick.expiry (due);

CREATE TABLE nonstick.field (
    session bigint NOT NULL,
    name text COLLATE "C" NOT NULL,
    value bytea NOT NULL,
    PRIMARY KEY (session, name)
) WITH (fillfactor = 80);

CREATE TABLE nonstick.event (
    session bigint NOT NULL,
    position bigint NOT NULL,
    tag bytea NOT NULL,
    stream bigint NOT NULL,
    data bytea NOT NULL,
    PRIMARY KEY (session, position)
) WITH (autovacuum_vacuum_scale_factor = 0.05);

CREATE TABLE nonstick.stream (
    session bigint NOT NULL,
    name bigint NOT NULL, -- the position of its first event
    attempt bigint NOT NULL,
    last bigint, -- position of its end; none while it is open
    PRIMARY KEY (session, name)
) WITH (fillfactor = 80);

-- What each writer wrote last. One append is outstanding at most, so all below it are known to be written.
CREATE TABLE nonstick.writer (
    session bigint NOT NULL,
    name text COLLATE "C" NOT NULL,
    sequence bigint NOT NULL,
    first bigint NOT NULL,
    stream bigint NOT NULL, -- the last of its own that it wrote to, 0 for none
    at float8 NOT NULL,
    PRIMARY KEY (session, name)
) WITH (fillfactor = 70);

-- Requests are bytes: what a client calls its request may hold what no text of PostgreSQL can.
CREATE TABLE nonstick.pending (session bigint NOT NULL, request bytea NOT NULL, PRIMARY KEY (session, request));
CREATE TABLE nonstick.cancel (
    session bigint NOT NULL,
    request bytea NOT NULL,
    at float8 NOT NULL,
    PRIMARY KEY (session, request)
);

-- The groups that limits count by. A group's number is the sum of its slots, so that creates need not wait for each
-- other.
CREATE TABLE nonstick.tally (
    grp text COLLATE "C" NOT NULL,
    slot int NOT NULL,
    n bigint NOT NULL,
    PRIMARY KEY (grp, slot)
) WITH (fillfactor = 50);
CREATE TABLE nonstick.member (
    session bigint NOT NULL,
    grp text COLLATE "C" NOT NULL,
    slot int NOT NULL,
    PRIMARY KEY (session, grp)
);

-- Sessions that have ended and left rows elsewhere; `sweep` removes those a few at a time.
CREATE TABLE nonstick.grave (session bigint PRIMARY KEY);

CREATE TABLE nonstick.node (name text COLLATE "C" PRIMARY KEY, until float8 NOT NULL) WITH (fillfactor = 50);


CREATE FUNCTION nonstick.clock() RETURNS float8 LANGUAGE sql VOLATILE AS
    'SELECT extract(epoch FROM clock_timestamp())::float8';

-- Sets the fields that have a value, and removes those that have none.
CREATE FUNCTION nonstick.change(sid bigint, names text[], vals bytea[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM nonstick.field f USING unnest(names, vals) AS new (name, value)
        WHERE f.session = sid AND f.name = new.name AND new.value IS NULL;
    INSERT INTO nonstick.field AS f (session, name, value)
        SELECT sid, new.name, new.value FROM unnest(names, vals) AS new (name, value) WHERE new.value IS NOT NULL
        ON CONFLICT (session, name) DO UPDATE SET value = excluded.value;
END $$;


-- ---- the record

-- Answers 'ok', 'exists', 'full' with the group, or what to do before calling again: 'bury' an expired session with
-- this key, or 'sweep', because expired ones may be what fills the group.
CREATE FUNCTION nonstick.create(
    new_key text, new_lifetime float8, names text[], vals bytea[], groups text[], limits bigint[],
    OUT outcome text, OUT full_group text
) LANGUAGE plpgsql AS $$
DECLARE
    -- Below this distance from its limit a group is counted by one create after the other, and so exactly.
    margin CONSTANT int := 64;
    my_slot CONSTANT int := pg_backend_pid() % 8;
    now_at float8 := nonstick.clock();
    expires float8;
    sid bigint;
    wanted record;
BEGIN
    SELECT s.expires_at INTO expires FROM nonstick.session s WHERE s.key = new_key;
    IF FOUND THEN
        outcome := CASE WHEN expires > now_at THEN 'exists' ELSE 'bury' END;
        RETURN;
    END IF;
    FOR wanted IN SELECT w.grp, w.most FROM unnest(groups, limits) AS w (grp, most) ORDER BY w.grp COLLATE "C" LOOP
        IF (SELECT coalesce(sum(t.n), 0) FROM nonstick.tally t WHERE t.grp = wanted.grp) + margin >= wanted.most THEN
            -- Held until the commit, so the next one counts this one too.
            PERFORM pg_advisory_xact_lock(hashtextextended('nonstick.' || wanted.grp, 0));
            IF (SELECT coalesce(sum(t.n), 0) FROM nonstick.tally t WHERE t.grp = wanted.grp) >= wanted.most THEN
                IF EXISTS (SELECT FROM nonstick.session s WHERE s.key = new_key) THEN
                    outcome := 'exists'; -- this call's twin was faster
                ELSIF EXISTS (SELECT FROM nonstick.expiry x WHERE x.due <= now_at) THEN
                    outcome := 'sweep';
                ELSE
                    outcome := 'full';
                    full_group := wanted.grp;
                END IF;
                RETURN;
            END IF;
        END IF;
    END LOOP;

    now_at := nonstick.clock();
    INSERT INTO nonstick.session (key, lifetime, expires_at, tidied_at)
        VALUES (new_key, new_lifetime, now_at + new_lifetime, now_at)
        ON CONFLICT (key) DO NOTHING RETURNING id INTO sid;
    IF NOT FOUND THEN
        outcome := 'exists';
        RETURN;
    END IF;
    INSERT INTO nonstick.expiry (session, due) VALUES (sid, now_at + new_lifetime);
    INSERT INTO nonstick.field (session, name, value)
        SELECT sid, f.name, f.value FROM unnest(names, vals) AS f (name, value);
    IF cardinality(groups) > 0 THEN
        INSERT INTO nonstick.member (session, grp, slot) SELECT sid, g.grp, my_slot FROM unnest(groups) AS g (grp);
        INSERT INTO nonstick.tally AS t (grp, slot, n)
            SELECT g.grp, my_slot, 1 FROM unnest(groups) AS g (grp) ORDER BY g.grp COLLATE "C"
            ON CONFLICT (grp, slot) DO UPDATE SET n = t.n + 1;
    END IF;
    outcome := 'ok';
END $$;

CREATE FUNCTION nonstick.load(
    session_key text,
    OUT live boolean, OUT names text[], OUT vals bytea[], OUT head bigint, OUT tag bytea, OUT cancels bytea[]
) LANGUAGE plpgsql AS $$
DECLARE
    now_at float8 := nonstick.clock();
    sid bigint;
    life float8;
    expires float8;
BEGIN
    -- One statement, so one snapshot: what an append changed is seen whole or not at all.
    SELECT s.id, s.lifetime, s.expires_at, s.head, s.tag, f.names, f.vals,
            ARRAY(SELECT c.request FROM nonstick.cancel c WHERE c.session = s.id AND c.at > now_at - CANCEL_SECONDS)
        INTO sid, life, expires, head, tag, names, vals, cancels
        FROM nonstick.session s
        LEFT JOIN LATERAL (
            SELECT array_agg(v.name) AS names, array_agg(v.value) AS vals FROM nonstick.field v WHERE v.session = s.id
        ) f ON true
        WHERE s.key = session_key AND s.expires_at > now_at;
    live := sid IS NOT NULL;
    IF live AND expires - now_at < (1 - FRESH_SHARE) * life THEN
        UPDATE nonstick.session s SET expires_at = greatest(s.expires_at, now_at + s.lifetime)
            WHERE s.id = sid AND s.expires_at > nonstick.clock();
        live := FOUND;
    END IF;
END $$;

-- Answers whether it was written; nothing if the session is gone.
CREATE FUNCTION nonstick.update(
    session_key text, names text[], vals bytea[], expected text[], expected_vals bytea[]
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    sid bigint;
    expires float8;
BEGIN
    SELECT s.id, s.expires_at INTO sid, expires FROM nonstick.session s WHERE s.key = session_key FOR UPDATE;
    IF NOT FOUND OR expires <= nonstick.clock() THEN RETURN NULL; END IF;
    IF EXISTS (
        SELECT FROM unnest(expected, expected_vals) AS x (name, value)
            LEFT JOIN nonstick.field f ON f.session = sid AND f.name = x.name
            WHERE f.value IS DISTINCT FROM x.value
    ) THEN RETURN false; END IF;
    PERFORM nonstick.change(sid, names, vals);
    RETURN true;
END $$;

-- Locks in the order of the ids: two nodes may renew the same sessions at once.
CREATE FUNCTION nonstick.touch(keys text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    ids bigint[];
    now_at float8;
BEGIN
    ids := ARRAY(
        SELECT s.id FROM nonstick.session s WHERE s.key = ANY (keys) AND s.expires_at > nonstick.clock()
            ORDER BY s.id FOR UPDATE
    );
    now_at := nonstick.clock();
    UPDATE nonstick.session s SET expires_at = greatest(s.expires_at, now_at + s.lifetime)
        WHERE s.id = ANY (ids) AND s.expires_at > now_at;
END $$;

-- Ends sessions whose rows the caller has locked. What they leave elsewhere is out of everybody's sight.
CREATE FUNCTION nonstick.bury(ids bigint[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM nonstick.expiry x WHERE x.session = ANY (ids);
    IF EXISTS (SELECT FROM nonstick.member m WHERE m.session = ANY (ids)) THEN
        PERFORM FROM nonstick.tally t
            WHERE (t.grp, t.slot) IN (SELECT m.grp, m.slot FROM nonstick.member m WHERE m.session = ANY (ids))
            ORDER BY t.grp, t.slot FOR UPDATE;
        UPDATE nonstick.tally t SET n = t.n - m.n
            FROM (SELECT grp, slot, count(*) AS n FROM nonstick.member WHERE session = ANY (ids) GROUP BY grp, slot) m
            WHERE t.grp = m.grp AND t.slot = m.slot;
        DELETE FROM nonstick.tally t
            WHERE t.n <= 0
            AND (t.grp, t.slot) IN (SELECT m.grp, m.slot FROM nonstick.member m WHERE m.session = ANY (ids));
        DELETE FROM nonstick.member m WHERE m.session = ANY (ids);
    END IF;
    INSERT INTO nonstick.grave (session) SELECT unnest(ids);
    DELETE FROM nonstick.session s WHERE s.id = ANY (ids);
END $$;

-- Answers whether the session was live.
CREATE FUNCTION nonstick.delete(session_key text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    sid bigint;
    expires float8;
BEGIN
    SELECT s.id, s.expires_at INTO sid, expires FROM nonstick.session s WHERE s.key = session_key FOR UPDATE;
    IF NOT FOUND THEN RETURN false; END IF;
    PERFORM nonstick.bury(ARRAY[sid]);
    RETURN expires > nonstick.clock();
END $$;

-- Looks at sessions that may have expired, and removes what ended ones left: a small batch of either. Answers how
-- much it did; as long as that is something, there may be more. Several callers do not wait for each other.
CREATE FUNCTION nonstick.sweep(batch int) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    now_at float8 := nonstick.clock();
    due_now bigint[];
    expired bigint[];
    buried bigint[];
    n int;
    done int := 0;
BEGIN
    due_now := ARRAY(
        SELECT x.session FROM nonstick.expiry x WHERE x.due <= now_at ORDER BY x.due LIMIT batch FOR UPDATE SKIP LOCKED
    );
    IF cardinality(due_now) > 0 THEN
        expired := ARRAY(
            SELECT s.id FROM nonstick.session s WHERE s.id = ANY (due_now) AND s.expires_at <= now_at
                ORDER BY s.id FOR UPDATE SKIP LOCKED
        );
        UPDATE nonstick.expiry x SET due = s.expires_at FROM nonstick.session s
            WHERE x.session = ANY (due_now) AND s.id = x.session AND s.expires_at > now_at;
        GET DIAGNOSTICS n = ROW_COUNT;
        done := n + cardinality(expired);
        PERFORM nonstick.bury(expired);
    END IF;

    buried := ARRAY(SELECT g.session FROM nonstick.grave g LIMIT 50 FOR UPDATE SKIP LOCKED);
    IF cardinality(buried) > 0 THEN
        DELETE FROM nonstick.event e WHERE (e.session, e.position) IN (
            SELECT o.session, o.position FROM nonstick.event o WHERE o.session = ANY (buried) LIMIT batch
        );
        GET DIAGNOSTICS n = ROW_COUNT;
        IF n < batch THEN
            DELETE FROM nonstick.field f WHERE f.session = ANY (buried);
            DELETE FROM nonstick.stream s WHERE s.session = ANY (buried);
            DELETE FROM nonstick.writer w WHERE w.session = ANY (buried);
            DELETE FROM nonstick.pending p WHERE p.session = ANY (buried);
            DELETE FROM nonstick.cancel c WHERE c.session = ANY (buried);
            DELETE FROM nonstick.grave g WHERE g.session = ANY (buried);
        END IF;
        done := done + cardinality(buried);
    END IF;
    DELETE FROM nonstick.node o WHERE o.until < now_at - 60;
    RETURN done;
END $$;


-- ---- the log

-- A stream of 0 is the standalone stream, -1 a new one. Requests that are not given are null. Answers 'ok',
-- 'duplicate' or the refusal.
CREATE FUNCTION nonstick.append(
    session_key text, my_writer text, my_sequence bigint, my_stream bigint, my_attempt bigint,
    take_over boolean, terminal boolean, tags bytea[], datas bytea[],
    expects bytea[], answers bytea, settles bytea, cancels bytea, uncancels bytea, names text[], vals bytea[],
    OUT outcome text, OUT first bigint, OUT size bigint, OUT count bigint
) LANGUAGE plpgsql AS $$
DECLARE
    log record;
    wrote record;
    held record;
    now_at float8;
    own bigint := 0;
    events int := cardinality(datas);
    final bigint;
BEGIN
    SELECT s.id, s.expires_at, s.head, s.size, s.count, s.tidied_at INTO log
        FROM nonstick.session s WHERE s.key = session_key FOR UPDATE;
    now_at := nonstick.clock();
    IF log.id IS NULL OR log.expires_at <= now_at THEN
        outcome := 'gone';
        RETURN;
    END IF;
    IF now_at - log.tidied_at > WRITER_SECONDS THEN PERFORM nonstick.tidy(log.id, now_at); END IF;
    first := log.head;
    size := log.size;
    count := log.count;

    -- First of all: has this been written? A lower number than the last is a late copy, never to be written either.
    IF my_writer <> '' THEN
        SELECT w.sequence, w.first, w.stream INTO wrote
            FROM nonstick.writer w WHERE w.session = log.id AND w.name = my_writer;
        IF FOUND THEN
            IF my_sequence <= wrote.sequence THEN
                outcome := 'duplicate';
                first := wrote.first;
                RETURN;
            END IF;
            own := wrote.stream;
        END IF;
    END IF;

    IF my_stream > 0 THEN
        SELECT s.attempt, s.last INTO held FROM nonstick.stream s WHERE s.session = log.id AND s.name = my_stream;
        outcome := CASE
            WHEN NOT FOUND OR held.last IS NOT NULL THEN 'closed'
            WHEN held.attempt <> my_attempt THEN 'fenced'
        END;
        IF outcome IS NOT NULL THEN RETURN; END IF;
    END IF;
    IF (answers IS NOT NULL
            AND NOT EXISTS (SELECT FROM nonstick.pending p WHERE p.session = log.id AND p.request = answers))
        OR (settles IS NOT NULL
            AND NOT EXISTS (SELECT FROM nonstick.pending p WHERE p.session = log.id AND p.request = settles)) THEN
        outcome := 'not pending';
        RETURN;
    END IF;

    final := log.head + events;
    IF events > 0 THEN
        first := log.head + 1;
        IF my_stream = -1 THEN own := first; ELSIF my_stream > 0 THEN own := my_stream; END IF;
        INSERT INTO nonstick.event (session, position, tag, stream, data)
            SELECT log.id, log.head + e.n, e.tag, CASE my_stream WHEN -1 THEN first ELSE my_stream END, e.data
            FROM unnest(tags, datas) WITH ORDINALITY AS e (tag, data, n);
        count := count + events;
        size := size + (SELECT sum(octet_length(d)) FROM unnest(datas) d);
        UPDATE nonstick.session s SET head = final, tag = tags[events], size = append.size, count = append.count
            WHERE s.id = log.id;
    ELSIF my_stream > 0 THEN
        own := my_stream;
    END IF;

    IF my_stream = -1 THEN
        INSERT INTO nonstick.stream (session, name, attempt, last)
            VALUES (log.id, first, my_attempt + take_over::int, CASE WHEN terminal THEN final END);
    ELSIF my_stream > 0 AND (take_over OR terminal) THEN
        UPDATE nonstick.stream s
            SET attempt = my_attempt + take_over::int, last = CASE WHEN terminal THEN final END
            WHERE s.session = log.id AND s.name = my_stream;
    END IF;
    IF my_writer <> '' THEN
        INSERT INTO nonstick.writer AS w (session, name, sequence, first, stream, at)
            VALUES (log.id, my_writer, my_sequence, append.first, own, now_at)
            ON CONFLICT (session, name) DO UPDATE
            SET sequence = excluded.sequence, first = excluded.first, stream = excluded.stream, at = excluded.at;
    END IF;
    IF cardinality(expects) > 0 THEN
        INSERT INTO nonstick.pending (session, request) SELECT log.id, unnest(expects) ON CONFLICT DO NOTHING;
    END IF;
    IF settles IS NOT NULL THEN
        DELETE FROM nonstick.pending p WHERE p.session = log.id AND p.request = settles;
    END IF;
    IF cancels IS NOT NULL THEN
        INSERT INTO nonstick.cancel AS c (session, request, at) VALUES (log.id, cancels, now_at)
            ON CONFLICT (session, request) DO UPDATE SET at = excluded.at;
        DELETE FROM nonstick.cancel c WHERE c.session = log.id AND c.request IN (
            SELECT o.request FROM nonstick.cancel o WHERE o.session = log.id
                ORDER BY o.request = cancels DESC, o.at DESC OFFSET MAX_CANCELS
        );
    END IF;
    IF uncancels IS NOT NULL THEN
        DELETE FROM nonstick.cancel c WHERE c.session = log.id AND c.request = uncancels;
    END IF;
    IF cardinality(names) > 0 THEN PERFORM nonstick.change(log.id, names, vals); END IF;
    outcome := 'ok';
END $$;

-- Forgets the writers that have been idle for long enough and whose stream is not kept, and old cancels.
CREATE FUNCTION nonstick.tidy(sid bigint, since float8) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM nonstick.writer w
        WHERE w.session = sid AND w.at <= since - WRITER_SECONDS
        AND NOT EXISTS (SELECT FROM nonstick.stream s WHERE s.session = sid AND s.name = w.stream);
    DELETE FROM nonstick.cancel c WHERE c.session = sid AND c.at <= since - CANCEL_SECONDS;
    UPDATE nonstick.session s SET tidied_at = since WHERE s.id = sid;
END $$;

-- Answers events, at most `most` and about READ_BYTES; or one row with the reason why there are none. STABLE: all of
-- it sees one snapshot.
CREATE FUNCTION nonstick.read(session_key text, after bigint, after_tag bytea, most int)
RETURNS TABLE (outcome text, "position" bigint, tag bytea, stream bigint, data bytea) LANGUAGE plpgsql STABLE AS $$
DECLARE
    now_at float8 := nonstick.clock();
    sid bigint;
    head bigint;
    there bytea;
    bytes bigint := 0;
BEGIN
    SELECT s.id, s.head INTO sid, head FROM nonstick.session s WHERE s.key = session_key AND s.expires_at > now_at;
    IF NOT FOUND THEN
        outcome := 'gone';
        RETURN NEXT;
        RETURN;
    END IF;
    IF after > head THEN
        outcome := 'diverged';
    ELSIF after > 0 AND after_tag <> '' THEN
        SELECT e.tag INTO there FROM nonstick.event e WHERE e.session = sid AND e.position = after;
        IF NOT FOUND THEN
            outcome := 'trimmed';
            "position" := coalesce((SELECT min(e.position) FROM nonstick.event e WHERE e.session = sid), 0);
        ELSIF there <> after_tag THEN
            outcome := 'diverged';
        END IF;
    END IF;
    IF outcome IS NOT NULL THEN
        RETURN NEXT;
        RETURN;
    END IF;
    FOR "position", tag, stream, data IN
        SELECT e.position, e.tag, e.stream, e.data FROM nonstick.event e
            WHERE e.session = sid AND e.position > after ORDER BY e.position LIMIT most
    LOOP
        bytes := bytes + octet_length(data);
        RETURN NEXT;
        EXIT WHEN bytes >= READ_BYTES;
    END LOOP;
END $$;

CREATE FUNCTION nonstick.trim(session_key text, streams bigint[], standalone_before bigint)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    sid bigint;
    expires float8;
BEGIN
    SELECT s.id, s.expires_at INTO sid, expires FROM nonstick.session s WHERE s.key = session_key FOR UPDATE;
    IF NOT FOUND OR expires <= nonstick.clock() THEN RETURN; END IF;
    WITH ended AS (
        DELETE FROM nonstick.stream s
            WHERE s.session = sid AND s.name = ANY (streams) AND s.last IS NOT NULL RETURNING s.name, s.last
    ), dropped AS (
        DELETE FROM nonstick.event e USING ended
            WHERE e.session = sid AND e.position BETWEEN ended.name AND ended.last AND e.stream = ended.name
            RETURNING octet_length(e.data) AS bytes
    ), old AS (
        DELETE FROM nonstick.event e WHERE e.session = sid AND e.position < standalone_before AND e.stream = 0
            RETURNING octet_length(e.data) AS bytes
    ), gone AS (
        SELECT coalesce(sum(d.bytes), 0) AS bytes, count(*) AS n FROM (TABLE dropped UNION ALL TABLE old) d
    )
    UPDATE nonstick.session s SET size = s.size - gone.bytes, count = s.count - gone.n
        FROM gone WHERE s.id = sid AND gone.n > 0;
END $$;


-- ---- nodes and the store itself

CREATE FUNCTION nonstick.grant_lease(node_name text, seconds float8) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO nonstick.node AS n (name, until) VALUES (node_name, nonstick.clock() + seconds)
        ON CONFLICT (name) DO UPDATE SET until = excluded.until;
END $$;

CREATE FUNCTION nonstick.release_lease(node_name text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM nonstick.node n WHERE n.name = node_name;
END $$;

CREATE FUNCTION nonstick.live(names text[]) RETURNS text[] LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN ARRAY(SELECT n.name FROM nonstick.node n WHERE n.name = ANY (names) AND n.until > nonstick.clock());
END $$;

-- A write: a standby, a full disk or a read-only database would answer SELECT as if all were well.
CREATE FUNCTION nonstick.ping() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE nonstick.meta SET pinged_at = nonstick.clock();
END $$;
