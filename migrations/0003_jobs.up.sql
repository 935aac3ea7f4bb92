-- The ledger: the durable truth about every accepted job, and its idempotency keys.

CREATE TABLE jobs (
    id                  uuid PRIMARY KEY,
    kind                text NOT NULL CHECK (length(kind) BETWEEN 1 AND 64),
    queue               text NOT NULL CHECK (queue ~ '^[A-Za-z0-9_.-]{1,64}$'),
    priority            smallint NOT NULL CHECK (priority BETWEEN 0 AND 9),
    tenant              text NOT NULL REFERENCES tenants (id),
    payload             jsonb NOT NULL,
    state               text NOT NULL DEFAULT 'waiting'
                        CHECK (state IN ('waiting', 'running', 'succeeded', 'cancelled', 'dead', 'parked')),
    -- How a job ended beyond its state, for example `superseded`.
    outcome             text,
    result              jsonb,
    -- Grows with every take; carried by every write (PROTOCOL.md 1).
    fence               bigint NOT NULL DEFAULT 0,
    -- Takes; those that ended in a lost lease; those that did so while the job ran alone (PROTOCOL.md 13).
    deliveries          integer NOT NULL DEFAULT 0,
    lost_deliveries     integer NOT NULL DEFAULT 0,
    lost_alone          integer NOT NULL DEFAULT 0,
    runs_alone          boolean NOT NULL DEFAULT false,
    -- Charged failures, and their limit.
    attempts            integer NOT NULL DEFAULT 0,
    max_attempts        integer NOT NULL DEFAULT 5 CHECK (max_attempts > 0),
    -- Hard cap on one run, not counting time spent waiting for a store to come back.
    timeout_ms          integer NOT NULL CHECK (timeout_ms > 0),
    run_at              timestamptz NOT NULL DEFAULT now(),
    worker              text,
    taken_at            timestamptz,
    document_id         uuid REFERENCES documents (id),
    doc_order           bigint,
    -- The job that enqueued this one, and the dead job that this one replays.
    parent              uuid REFERENCES jobs (id) ON DELETE SET NULL,
    replay_of           uuid REFERENCES jobs (id) ON DELETE SET NULL,
    traceparent         text,
    tracestate          text,
    cancel_requested_at timestamptz,
    -- Null: the relay still has to put the job into Redis (PROTOCOL.md 18).
    dispatched_at       timestamptz,
    -- Since when no worker has known the kind (PROTOCOL.md 15).
    unroutable_since    timestamptz,
    last_error          text,
    created_at          timestamptz NOT NULL DEFAULT now(),
    finished_at         timestamptz,
    CHECK ((document_id IS NULL) = (doc_order IS NULL)),
    CHECK ((state IN ('succeeded', 'cancelled', 'dead', 'parked')) = (finished_at IS NOT NULL)),
    CHECK (state <> 'running' OR worker IS NOT NULL)
);
-- relay: jobs still to be dispatched
CREATE INDEX jobs_undispatched ON jobs (created_at) WHERE dispatched_at IS NULL AND state = 'waiting';
-- reconciler, auditor, `jobs list --state`: unfinished jobs, paged by id
CREATE INDEX jobs_unfinished ON jobs (id) WHERE state IN ('waiting', 'running');
-- take: other unfinished jobs of the same document
CREATE INDEX jobs_document_unfinished ON jobs (document_id, doc_order) WHERE state IN ('waiting', 'running') AND document_id IS NOT NULL;
-- `jobs list --tenant`
CREATE INDEX jobs_tenant ON jobs (tenant, id DESC);
-- counts by state; retention
CREATE INDEX jobs_finished ON jobs (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX jobs_parent ON jobs (parent) WHERE parent IS NOT NULL;
CREATE INDEX jobs_replay_of ON jobs (replay_of) WHERE replay_of IS NOT NULL;

CREATE TABLE idempotency_keys (
    tenant      text NOT NULL REFERENCES tenants (id),
    scope       text NOT NULL,
    key         text NOT NULL CHECK (length(key) BETWEEN 1 AND 256),
    -- SHA-256 of kind and payload: the same key with another request is a conflict (PROTOCOL.md 19).
    fingerprint bytea NOT NULL CHECK (octet_length(fingerprint) = 32),
    job_id      uuid NOT NULL REFERENCES jobs (id) ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED,
    expires_at  timestamptz NOT NULL,
    PRIMARY KEY (tenant, scope, key)
);
CREATE INDEX idempotency_keys_expiry ON idempotency_keys (expires_at);
CREATE INDEX idempotency_keys_job ON idempotency_keys (job_id);

-- One row for each charged failure of a job.
CREATE TABLE job_attempts (
    job_id     uuid NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    attempt    integer NOT NULL CHECK (attempt > 0),
    fence      bigint NOT NULL,
    worker     text NOT NULL,
    started_at timestamptz NOT NULL,
    ended_at   timestamptz NOT NULL DEFAULT now(),
    class      text NOT NULL,
    error      text NOT NULL,
    PRIMARY KEY (job_id, attempt)
);
