-- What may become of a job and of a run: what has ended stays as it ended, and a run that has turned back goes on back. The same is
-- in sagas/src/state.rs. Triggers after the update, because a condition that does not hold costs next to nothing there
-- (docs/decisions/0027-batches-count-by-events.md).
CREATE FUNCTION refuse_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%.% is % and can not become %', TG_TABLE_NAME, NEW.id, OLD.state, NEW.state
        USING ERRCODE = 'check_violation', CONSTRAINT = TG_NAME, TABLE = TG_TABLE_NAME;
END $$;

CREATE TRIGGER jobs_transitions AFTER UPDATE OF state ON jobs FOR EACH ROW
    WHEN (NEW.state <> OLD.state AND CASE OLD.state
        WHEN 'waiting' THEN NEW.state NOT IN ('running', 'cancelled')
        WHEN 'running' THEN false
        WHEN 'parked' THEN NEW.state = 'running'
        ELSE true END)
    EXECUTE FUNCTION refuse_transition();

CREATE TRIGGER sagas_transitions AFTER UPDATE OF state ON sagas FOR EACH ROW
    WHEN (NEW.state <> OLD.state AND CASE OLD.state
        WHEN 'running' THEN false
        WHEN 'finishing' THEN NEW.state <> 'completed'
        WHEN 'compensating' THEN NEW.state NOT IN ('compensated', 'parked')
        WHEN 'parked' THEN NEW.state = 'finishing'
        ELSE true END)
    EXECUTE FUNCTION refuse_transition();
