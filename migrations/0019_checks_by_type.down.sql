ALTER TABLE saga_steps
    ALTER seq TYPE integer, ALTER direction TYPE text, ALTER state TYPE text, ALTER attempts TYPE integer,
    ADD CONSTRAINT saga_steps_seq_check CHECK (seq >= 0),
    ADD CONSTRAINT saga_steps_direction_check CHECK (direction IN ('execute', 'compensate')),
    ADD CONSTRAINT saga_steps_state_check CHECK (state IN ('succeeded', 'failed')),
    ADD CONSTRAINT saga_steps_attempts_check CHECK (attempts > 0);
ALTER TABLE sagas
    ALTER next_step TYPE smallint,
    ADD CONSTRAINT sagas_next_step_check CHECK (next_step >= 0);
ALTER TABLE jobs
    ALTER kind TYPE text, ALTER queue TYPE text, ALTER priority TYPE smallint, ALTER max_attempts TYPE integer, ALTER timeout_ms TYPE integer,
    ADD CONSTRAINT jobs_kind_check CHECK (length(kind) BETWEEN 1 AND 64),
    ADD CONSTRAINT jobs_queue_check CHECK (queue ~ '^[A-Za-z0-9_.-]{1,64}$'),
    ADD CONSTRAINT jobs_priority_check CHECK (priority BETWEEN 0 AND 9),
    ADD CONSTRAINT jobs_max_attempts_check CHECK (max_attempts > 0),
    ADD CONSTRAINT jobs_timeout_ms_check CHECK (timeout_ms > 0);
DROP DOMAIN job_kind, queue_name, job_priority, job_attempts_allowed, job_timeout_ms, saga_position, step_number, step_direction,
    step_state, step_attempts;
