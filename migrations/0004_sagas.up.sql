-- The saga log and the dead letters.

CREATE TABLE sagas (
    id                 uuid PRIMARY KEY,
    job_id             uuid NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    kind               text NOT NULL,
    definition_version integer NOT NULL,
    tenant             text NOT NULL REFERENCES tenants (id),
    -- running → finishing → completed, or running → compensating → compensated | parked
    state              text NOT NULL CHECK (state IN ('running', 'compensating', 'finishing', 'completed', 'compensated', 'parked')),
    -- The first forward step that the log does not know to be done.
    next_step          smallint NOT NULL DEFAULT 0 CHECK (next_step >= 0),
    -- The saga's typed data, carried from step to step.
    data               jsonb NOT NULL,
    -- How the job ends once compensation is done; set before the first compensating call (PROTOCOL.md 6).
    verdict            jsonb,
    fence              bigint NOT NULL,
    -- Deliveries lost since compensation began: its own budget (PROTOCOL.md 13).
    lost_compensating  integer NOT NULL DEFAULT 0,
    error              text,
    created_at         timestamptz NOT NULL DEFAULT now(),
    updated_at         timestamptz NOT NULL DEFAULT now(),
    finished_at        timestamptz,
    CHECK ((state IN ('completed', 'compensated')) = (finished_at IS NOT NULL)),
    CHECK (state NOT IN ('compensating', 'compensated', 'parked') OR verdict IS NOT NULL)
);
-- A job has one unfinished run at a time.
CREATE UNIQUE INDEX sagas_one_open_run ON sagas (job_id) WHERE state IN ('running', 'compensating');
CREATE INDEX sagas_job ON sagas (job_id);
-- `sagas list --state`, auditor: everything not ended well
CREATE INDEX sagas_unfinished ON sagas (state, id) WHERE state NOT IN ('completed', 'compensated');

CREATE TABLE saga_steps (
    saga_id    uuid NOT NULL REFERENCES sagas (id) ON DELETE CASCADE,
    seq        integer NOT NULL CHECK (seq >= 0),
    step_name  text NOT NULL,
    direction  text NOT NULL CHECK (direction IN ('execute', 'compensate')),
    state      text NOT NULL CHECK (state IN ('succeeded', 'failed')),
    attempts   integer NOT NULL CHECK (attempts > 0),
    fence      bigint NOT NULL,
    started_at timestamptz NOT NULL,
    ended_at   timestamptz NOT NULL,
    error      text,
    PRIMARY KEY (saga_id, fence, seq)
);

CREATE TABLE dead_letters (
    id          uuid PRIMARY KEY,
    -- A job dies once; a replay is a new job.
    job_id      uuid NOT NULL UNIQUE REFERENCES jobs (id) ON DELETE CASCADE,
    saga_id     uuid REFERENCES sagas (id) ON DELETE SET NULL,
    tenant      text NOT NULL REFERENCES tenants (id),
    kind        text NOT NULL,
    queue       text NOT NULL,
    class       text NOT NULL,
    reason      text NOT NULL,
    -- Outermost first.
    error_chain jsonb NOT NULL DEFAULT '[]',
    payload     jsonb NOT NULL,
    traceparent text,
    created_at  timestamptz NOT NULL DEFAULT now(),
    state       text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'replayed', 'discarded')),
    resolved_at timestamptz,
    resolved_by text,
    note        text,
    replay_job  uuid REFERENCES jobs (id) ON DELETE SET NULL,
    CHECK ((state = 'open') = (resolved_at IS NULL))
);
-- `dlq list`, with its filters
CREATE INDEX dead_letters_open ON dead_letters (created_at DESC) WHERE state = 'open';
CREATE INDEX dead_letters_tenant ON dead_letters (tenant, created_at DESC);
CREATE INDEX dead_letters_kind ON dead_letters (kind, class, created_at DESC);
CREATE INDEX dead_letters_saga ON dead_letters (saga_id) WHERE saga_id IS NOT NULL;
CREATE INDEX dead_letters_replay ON dead_letters (replay_job) WHERE replay_job IS NOT NULL;
