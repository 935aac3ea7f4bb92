-- What sagas wait for without holding a slot, the signals that are sent to jobs, and what the log knows of a run beyond
-- its next step.

CREATE TABLE saga_waits (
    saga_id    uuid NOT NULL REFERENCES sagas (id) ON DELETE CASCADE,
    kind       text NOT NULL CHECK (kind IN ('timer', 'signal', 'children')),
    -- The step's own word for it; a signal's name.
    name       text NOT NULL CHECK (length(name) BETWEEN 1 AND 128),
    -- When a timer is due, or a wait for a signal is given up. Fixed by the first delivery that gets here.
    due_at     timestamptz,
    -- The batch of the children, which has no foreign key: a batch may be forgotten before the saga is.
    batch_id   uuid,
    -- The delivery that asked last: what an earlier one asked for and this one doesn't wakes nobody.
    fence      bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    ended_at   timestamptz,
    -- Decided once: a later delivery gets the same answer.
    outcome    text CHECK (outcome IN ('due', 'answered', 'timed_out')),
    PRIMARY KEY (saga_id, kind, name),
    CHECK ((ended_at IS NULL) = (outcome IS NULL)),
    CHECK ((kind = 'children') = (batch_id IS NOT NULL)),
    CHECK (kind = 'children' OR due_at IS NOT NULL)
);
-- collector: who waits for a batch that has finished
CREATE INDEX saga_waits_batch ON saga_waits (batch_id) WHERE batch_id IS NOT NULL AND ended_at IS NULL;

CREATE TABLE job_signals (
    job_id         uuid NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    name           text NOT NULL CHECK (length(name) BETWEEN 1 AND 128),
    payload        jsonb NOT NULL,
    -- The key that the payload is sealed with.
    payload_key_id text,
    sent_at        timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (job_id, name)
);

ALTER TABLE sagas
    -- Branches of the next step, a group, that are done.
    ADD COLUMN done text[] NOT NULL DEFAULT '{}',
    -- When the pivot was about to begin, for pivots that don't commit themselves: from then on the run only goes forward.
    ADD COLUMN pivot_at timestamptz;
