-- Version 2: an update may lengthen the session's lifetime, and then renews its expiry. Nodes of version 1 go on with the
-- function that has one argument less.
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
