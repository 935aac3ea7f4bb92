-- Batches: jobs that are counted together, with a job that is enqueued once they have ended. And the progress of
-- running jobs.

CREATE TABLE batches (
    id           uuid PRIMARY KEY,
    tenant       text NOT NULL REFERENCES tenants (id),
    name         text NOT NULL CHECK (length(name) BETWEEN 1 AND 256),
    -- The job whose work this batch is; and that job's own batch, of which this one counts as a member.
    parent       uuid REFERENCES jobs (id) ON DELETE SET NULL,
    outer_batch  uuid REFERENCES batches (id) ON DELETE SET NULL,
    -- What the collector has folded in; what is still to come stands in `batch_events`.
    total        bigint NOT NULL DEFAULT 0 CHECK (total >= 0),
    succeeded    bigint NOT NULL DEFAULT 0 CHECK (succeeded >= 0),
    -- Dead and parked.
    failed       bigint NOT NULL DEFAULT 0 CHECK (failed >= 0),
    cancelled    bigint NOT NULL DEFAULT 0 CHECK (cancelled >= 0),
    -- The job to enqueue, until it is; and when it is enqueued: at the end in any case, or only if all members succeeded.
    callback     jsonb,
    callback_on  text CHECK (callback_on IN ('complete', 'success')),
    called_at    timestamptz,
    callback_job uuid REFERENCES jobs (id) ON DELETE SET NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    -- From then on it takes no more members.
    sealed_at    timestamptz,
    cancelled_at timestamptz,
    finished_at  timestamptz,
    CHECK (cancelled_at IS NULL OR sealed_at IS NOT NULL),
    CHECK (finished_at IS NULL OR sealed_at IS NOT NULL),
    CHECK (called_at IS NULL OR (finished_at IS NOT NULL AND callback IS NULL)),
    CHECK ((callback IS NULL AND called_at IS NULL) = (callback_on IS NULL))
);
CREATE INDEX batches_tenant ON batches (tenant, id DESC);
-- collector: members to cancel, and batches in them
CREATE INDEX batches_cancelling ON batches (id) WHERE cancelled_at IS NOT NULL AND finished_at IS NULL;
-- retention
CREATE INDEX batches_finished ON batches (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX batches_parent ON batches (parent) WHERE parent IS NOT NULL;
CREATE INDEX batches_outer ON batches (outer_batch) WHERE outer_batch IS NOT NULL;
CREATE INDEX batches_callback_job ON batches (callback_job) WHERE callback_job IS NOT NULL;

ALTER TABLE jobs ADD COLUMN batch_id uuid REFERENCES batches (id);
-- cancel: members, paged by id
CREATE INDEX jobs_batch ON jobs (batch_id, id) WHERE batch_id IS NOT NULL;
-- progress of a batch: its running members
CREATE INDEX jobs_batch_running ON jobs (batch_id) WHERE batch_id IS NOT NULL AND state = 'running';

-- What happened to batches since the collector last folded. Rows are only added, in the transaction of what they tell,
-- so that members that end at once neither wait for one row nor lock it in different orders.
CREATE TABLE batch_events (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- No foreign key, which would lock the batch: the members' own keeps it there.
    batch     uuid NOT NULL,
    added     integer NOT NULL DEFAULT 0,
    succeeded integer NOT NULL DEFAULT 0,
    failed    integer NOT NULL DEFAULT 0,
    cancelled integer NOT NULL DEFAULT 0
);
CREATE INDEX batch_events_batch ON batch_events (batch, id);

-- Tells what became of a member, whichever statement did it. A replay takes the place of the dead job that it replays.
CREATE FUNCTION count_batch_member() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        INSERT INTO batch_events (batch, succeeded, failed, cancelled)
        VALUES (NEW.batch_id, (NEW.state = 'succeeded')::integer, (NEW.state IN ('dead', 'parked'))::integer,
                (NEW.state = 'cancelled')::integer);
    ELSIF EXISTS (SELECT FROM jobs j WHERE j.id = NEW.replay_of AND j.batch_id = NEW.batch_id AND j.state IN ('dead', 'parked')) THEN
        INSERT INTO batch_events (batch, failed) VALUES (NEW.batch_id, -1);
    ELSE
        INSERT INTO batch_events (batch, added) VALUES (NEW.batch_id, 1);
    END IF;
    RETURN NULL;
END $$;
-- For each row, with conditions that are looked at before the function is called: jobs without a batch pay nothing.
CREATE TRIGGER jobs_batch_added AFTER INSERT ON jobs
    FOR EACH ROW WHEN (NEW.batch_id IS NOT NULL) EXECUTE FUNCTION count_batch_member();
CREATE TRIGGER jobs_batch_ended AFTER UPDATE OF state ON jobs
    FOR EACH ROW WHEN (NEW.batch_id IS NOT NULL AND OLD.state IN ('waiting', 'running')
                       AND NEW.state IN ('succeeded', 'cancelled', 'dead', 'parked'))
    EXECUTE FUNCTION count_batch_member();

-- How far a running job says it is. Shown while its fence is the job's: an earlier delivery's word doesn't count.
CREATE TABLE job_progress (
    job_id  uuid PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    fence   bigint NOT NULL,
    percent smallint NOT NULL CHECK (percent BETWEEN 0 AND 100),
    message text,
    at      timestamptz NOT NULL DEFAULT now()
);
