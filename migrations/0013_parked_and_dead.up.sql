-- What a person did about a parked run; and members of batches whose parked job goes on or is closed.

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
