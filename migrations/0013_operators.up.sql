-- What operators do about parked runs, and the auditor's place. Members of batches whose parked job goes on or is closed count anew.

-- Set by `flotilla sagas resolve`: the run was closed by hand, and `state` says in which direction.
ALTER TABLE sagas ADD COLUMN resolved_at timestamptz, ADD COLUMN resolved_by text, ADD COLUMN resolution text,
    ADD CONSTRAINT sagas_resolved CHECK ((resolved_at IS NULL) = (resolved_by IS NULL)
                                         AND (resolved_at IS NULL) = (resolution IS NULL)
                                         AND (resolved_at IS NULL OR finished_at IS NOT NULL));

-- A parked member counts as failed, and does not any more once it goes on or is closed as something else.
CREATE FUNCTION count_batch_member_again() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO batch_events (batch, succeeded, failed, cancelled)
    VALUES (NEW.batch_id, (NEW.state = 'succeeded')::integer, (NEW.state = 'dead')::integer - 1,
            (NEW.state = 'cancelled')::integer);
    RETURN NULL;
END $$;
CREATE TRIGGER jobs_batch_reopened AFTER UPDATE OF state ON jobs
    FOR EACH ROW WHEN (NEW.batch_id IS NOT NULL AND OLD.state = 'parked' AND NEW.state <> 'parked')
    EXECUTE FUNCTION count_batch_member_again();

-- Who of the fleet audits, when the next audit is due, and what the last one found: one row.
CREATE TABLE auditor (
    the_one     boolean PRIMARY KEY DEFAULT true CHECK (the_one),
    created_at  timestamptz NOT NULL DEFAULT now(),
    -- Not before a new fleet has been filled.
    due_at      timestamptz NOT NULL DEFAULT now() + interval '10 minutes',
    holder      text,
    held_until  timestamptz,
    started_at  timestamptz,
    -- Of the last audit that came to its end: when, what stood after it by kind, and its report.
    finished_at timestamptz,
    drift       jsonb NOT NULL DEFAULT '{}',
    report      jsonb,
    CHECK ((holder IS NULL) = (held_until IS NULL))
);
INSERT INTO auditor DEFAULT VALUES;
