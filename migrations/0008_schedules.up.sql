-- Recurring jobs. A tick is one transaction: it inserts the job and moves next_tick_at (PROTOCOL.md 17).

CREATE TABLE schedules (
    id           uuid PRIMARY KEY,
    tenant       text NOT NULL REFERENCES tenants (id),
    -- The owner's own name for it.
    name         text NOT NULL CHECK (name ~ '^[A-Za-z0-9_.-]{1,64}$'),
    kind         text NOT NULL CHECK (length(kind) BETWEEN 1 AND 64),
    queue        text NOT NULL CHECK (queue ~ '^[A-Za-z0-9_.-]{1,64}$'),
    priority     smallint NOT NULL CHECK (priority BETWEEN 0 AND 9),
    payload      jsonb NOT NULL,
    max_attempts integer NOT NULL CHECK (max_attempts > 0),
    timeout_ms   integer NOT NULL CHECK (timeout_ms > 0),
    cron         text NOT NULL CHECK (length(cron) BETWEEN 1 AND 256),
    -- An IANA name, such as Europe/Berlin.
    time_zone    text NOT NULL CHECK (length(time_zone) BETWEEN 1 AND 64),
    -- What becomes of ticks for which no process was there in time.
    catch_up     text NOT NULL CHECK (catch_up IN ('skip', 'one', 'all')),
    -- Late ticks that `all` makes up for at most, the newest.
    max_catch_up integer NOT NULL CHECK (max_catch_up BETWEEN 1 AND 1000),
    paused_at    timestamptz,
    -- The first tick that has not been dealt with; null: the expression names no further time.
    next_tick_at timestamptz,
    -- The last tick that enqueued a job, and that job; its record may be gone by now.
    last_tick_at timestamptz,
    last_job     uuid,
    -- Why the last tick enqueued nothing although it should have.
    last_error   text,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    UNIQUE (tenant, name)
);
-- cron: what is due
CREATE INDEX schedules_due ON schedules (next_tick_at) WHERE paused_at IS NULL AND next_tick_at IS NOT NULL;
