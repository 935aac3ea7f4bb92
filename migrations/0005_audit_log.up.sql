-- Who did what by hand: replays, discards, cancels, repairs. One partition a month, made ahead and dropped by retention.

CREATE TABLE audit_log (
    id      uuid NOT NULL,
    at      timestamptz NOT NULL DEFAULT now(),
    actor   text NOT NULL,
    tenant  text,
    action  text NOT NULL,
    subject text NOT NULL,
    detail  jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (at, id)
) PARTITION BY RANGE (at);
CREATE INDEX audit_log_subject ON audit_log (subject, at DESC);

-- Makes the partitions of this month and the `ahead` months after it; returns how many were missing.
CREATE FUNCTION ensure_audit_partitions(ahead integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    first date := date_trunc('month', now() AT TIME ZONE 'UTC')::date;
    month date;
    made  integer := 0;
BEGIN
    -- Two callers at once would race to create the same table.
    PERFORM pg_advisory_xact_lock(hashtext('flotilla.audit_log'));
    FOR i IN 0..ahead LOOP
        month := (first + make_interval(months => i))::date;
        IF to_regclass(format('%I', 'audit_log_' || to_char(month, 'YYYYMM'))) IS NULL THEN
            EXECUTE format('CREATE TABLE %I PARTITION OF audit_log FOR VALUES FROM (%L) TO (%L)',
                           'audit_log_' || to_char(month, 'YYYYMM'),
                           month::text || ' 00:00:00+00',
                           ((month + interval '1 month')::date)::text || ' 00:00:00+00');
            made := made + 1;
        END IF;
    END LOOP;
    RETURN made;
END $$;

-- Drops the partitions that end before `now() - keep`; returns how many.
CREATE FUNCTION drop_audit_partitions(keep interval) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    part    record;
    dropped integer := 0;
BEGIN
    FOR part IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'audit_log'::regclass
          AND to_date(right(c.relname, 6), 'YYYYMM') + interval '1 month' <= (now() - keep) AT TIME ZONE 'UTC'
    LOOP
        EXECUTE format('DROP TABLE %I', part.relname);
        dropped := dropped + 1;
    END LOOP;
    RETURN dropped;
END $$;

SELECT ensure_audit_partitions(3);
