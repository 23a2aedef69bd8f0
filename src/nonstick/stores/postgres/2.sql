-- Version 2. An append to a stream says when the store has lost earlier ones of its writer, and an append says the tag of
-- the entry before; an update may lengthen the session's lifetime; a record comes with its log's size; a read is bounded
-- by bytes, and a log can be skimmed. Nodes of version 1 go on with the functions that they know.

-- A random value that tells this history of the data from any other: history.py.
CREATE TABLE nonstick.mark (only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row), mark text NOT NULL);

-- Lengthening it renews the expiry. Nodes of version 1 go on with the function that has one argument less.
CREATE FUNCTION nonstick.update(
    session_key text, names text[], vals bytea[], expected text[], expected_vals bytea[], new_lifetime float8
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    written boolean := nonstick.update(session_key, names, vals, expected, expected_vals);
BEGIN
    IF written AND new_lifetime IS NOT NULL THEN
        -- Its row is locked by now, and `due` may be earlier than the expiry.
        UPDATE nonstick.session s SET lifetime = new_lifetime, expires_at = nonstick.clock() + new_lifetime
            WHERE s.key = session_key;
    END IF;
    RETURN written;
END $$;


-- As version 1's append, but for 'diverged' and `before`, the tag of the entry after which it wrote. A stream of 0 is the
-- standalone stream, -1 a new one. Requests that are not given are null. Answers 'ok', 'duplicate' or the refusal.
CREATE FUNCTION nonstick.extend(
    session_key text, my_writer text, my_sequence bigint, my_stream bigint, my_attempt bigint,
    take_over boolean, terminal boolean, tags bytea[], datas bytea[],
    expects bytea[], answers bytea, settles bytea, cancels bytea, uncancels bytea, names text[], vals bytea[],
    OUT outcome text, OUT first bigint, OUT size bigint, OUT count bigint, OUT before bytea
) LANGUAGE plpgsql AS $$
DECLARE
    log record;
    wrote record;
    held record;
    now_at float8;
    own bigint := 0;
    last_sequence bigint := 0;
    events int := cardinality(datas);
    final bigint;
BEGIN
    SELECT s.id, s.expires_at, s.head, s.tag, s.size, s.count, s.tidied_at INTO log
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
    before := log.tag;

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
            last_sequence := wrote.sequence;
        END IF;
    END IF;

    IF my_stream > 0 THEN
        SELECT s.attempt, s.last INTO held FROM nonstick.stream s WHERE s.session = log.id AND s.name = my_stream;
        outcome := CASE
            WHEN NOT FOUND OR held.last IS NOT NULL THEN 'closed'
            WHEN held.attempt <> my_attempt THEN 'fenced'
            WHEN my_writer <> '' AND my_sequence <> last_sequence + 1 THEN 'diverged'
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
        UPDATE nonstick.session s SET head = final, tag = tags[events], size = extend.size, count = extend.count
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
            VALUES (log.id, my_writer, my_sequence, extend.first, own, now_at)
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

-- Nodes of version 1 go on with this one.
CREATE OR REPLACE FUNCTION nonstick.append(
    session_key text, my_writer text, my_sequence bigint, my_stream bigint, my_attempt bigint,
    take_over boolean, terminal boolean, tags bytea[], datas bytea[],
    expects bytea[], answers bytea, settles bytea, cancels bytea, uncancels bytea, names text[], vals bytea[],
    OUT outcome text, OUT first bigint, OUT size bigint, OUT count bigint
) LANGUAGE plpgsql AS $$
BEGIN
    SELECT e.outcome, e.first, e.size, e.count INTO outcome, first, size, count FROM nonstick.extend(
        session_key, my_writer, my_sequence, my_stream, my_attempt, take_over, terminal, tags, datas,
        expects, answers, settles, cancels, uncancels, names, vals
    ) e;
END $$;


-- As version 1's, with the log's size.
CREATE FUNCTION nonstick.load(
    session_key text, share float8,
    OUT live boolean, OUT names text[], OUT vals bytea[], OUT head bigint, OUT tag bytea, OUT cancels bytea[],
    OUT size bigint, OUT count bigint
) LANGUAGE plpgsql AS $$
DECLARE
    now_at float8 := nonstick.clock();
    sid bigint;
    life float8;
    expires float8;
BEGIN
    -- One statement, so one snapshot: what an append changed is seen whole or not at all.
    SELECT s.id, s.lifetime, s.expires_at, s.head, s.tag, s.size, s.count, f.names, f.vals,
            ARRAY(SELECT c.request FROM nonstick.cancel c WHERE c.session = s.id AND c.at > now_at - CANCEL_SECONDS)
        INTO sid, life, expires, head, tag, size, count, names, vals, cancels
        FROM nonstick.session s
        LEFT JOIN LATERAL (
            SELECT array_agg(v.name) AS names, array_agg(v.value) AS vals FROM nonstick.field v WHERE v.session = s.id
        ) f ON true
        WHERE s.key = session_key AND s.expires_at > now_at;
    live := sid IS NOT NULL;
    IF live AND expires - now_at < (1 - share) * life THEN
        UPDATE nonstick.session s SET expires_at = greatest(s.expires_at, now_at + s.lifetime)
            WHERE s.id = sid AND s.expires_at > nonstick.clock();
        live := FOUND;
    END IF;
END $$;

-- Whether a log goes on after a cursor: the session's id, or the reason why not. STABLE, as those that ask: all of it sees
-- one snapshot.
CREATE FUNCTION nonstick.place(
    session_key text, after bigint, after_tag bytea, OUT sid bigint, OUT outcome text, OUT oldest bigint
) LANGUAGE plpgsql STABLE AS $$
DECLARE
    now_at float8 := nonstick.clock();
    head bigint;
    there bytea;
BEGIN
    SELECT s.id, s.head INTO sid, head FROM nonstick.session s WHERE s.key = session_key AND s.expires_at > now_at;
    IF NOT FOUND THEN
        outcome := 'gone';
    ELSIF after > head THEN
        outcome := 'diverged';
    ELSIF after > 0 AND after_tag <> '' THEN
        SELECT e.tag INTO there FROM nonstick.event e WHERE e.session = sid AND e.position = after;
        IF NOT FOUND THEN
            outcome := 'trimmed';
            oldest := coalesce((SELECT min(e.position) FROM nonstick.event e WHERE e.session = sid), 0);
        ELSIF there <> after_tag THEN
            outcome := 'diverged';
        END IF;
    END IF;
END $$;

-- Answers events, at most `most`, and the first or no more than `most_bytes`; or one row with the reason why there are none.
CREATE FUNCTION nonstick.read(session_key text, after bigint, after_tag bytea, most int, most_bytes int)
RETURNS TABLE (outcome text, "position" bigint, tag bytea, stream bigint, data bytea) LANGUAGE plpgsql STABLE AS $$
DECLARE
    sid bigint;
    bytes bigint := 0;
    first boolean := true;
BEGIN
    SELECT p.sid, p.outcome, p.oldest INTO sid, outcome, "position" FROM nonstick.place(session_key, after, after_tag) p;
    IF outcome IS NOT NULL THEN
        RETURN NEXT;
        RETURN;
    END IF;
    -- A large value is not fetched before it is answered.
    FOR "position", tag, stream, data IN
        SELECT e.position, e.tag, e.stream, e.data FROM nonstick.event e
            WHERE e.session = sid AND e.position > after ORDER BY e.position LIMIT most
    LOOP
        bytes := bytes + octet_length(data);
        EXIT WHEN bytes > most_bytes AND NOT first;
        RETURN NEXT;
        first := false;
    END LOOP;
END $$;

-- As `read`, with the first `clip` bytes of each event alone, and its size.
CREATE FUNCTION nonstick.skim(session_key text, after bigint, after_tag bytea, most int, clip int)
RETURNS TABLE (outcome text, "position" bigint, tag bytea, stream bigint, data bytea, size int)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    sid bigint;
BEGIN
    SELECT p.sid, p.outcome, p.oldest INTO sid, outcome, "position" FROM nonstick.place(session_key, after, after_tag) p;
    IF outcome IS NOT NULL THEN
        RETURN NEXT;
        RETURN;
    END IF;
    RETURN QUERY
        SELECT NULL::text, e.position, e.tag, e.stream, substring(e.data FROM 1 FOR clip), octet_length(e.data)
            FROM nonstick.event e WHERE e.session = sid AND e.position > after ORDER BY e.position LIMIT most;
END $$;
