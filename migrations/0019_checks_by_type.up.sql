-- Postgres reads a table's CHECK constraints anew for each statement that writes to it, also to columns that they don't speak of: a
-- sixth of what it costs to take one job. A type's own checks are kept for the session, and only run where a column of the type is
-- assigned. See docs/decisions/0048-checks-by-type.md.
CREATE DOMAIN job_kind AS text;
CREATE DOMAIN queue_name AS text;
CREATE DOMAIN job_priority AS smallint;
CREATE DOMAIN job_attempts_allowed AS integer;
CREATE DOMAIN job_timeout_ms AS integer;
CREATE DOMAIN saga_position AS smallint;
CREATE DOMAIN step_number AS integer;
CREATE DOMAIN step_direction AS text;
CREATE DOMAIN step_state AS text;
CREATE DOMAIN step_attempts AS integer;

-- Without a check a domain is its base type under another name: no row is rewritten.
ALTER TABLE jobs
    ALTER kind TYPE job_kind, ALTER queue TYPE queue_name, ALTER priority TYPE job_priority,
    ALTER max_attempts TYPE job_attempts_allowed, ALTER timeout_ms TYPE job_timeout_ms,
    DROP CONSTRAINT jobs_kind_check, DROP CONSTRAINT jobs_queue_check, DROP CONSTRAINT jobs_priority_check,
    DROP CONSTRAINT jobs_max_attempts_check, DROP CONSTRAINT jobs_timeout_ms_check;
ALTER TABLE sagas
    ALTER next_step TYPE saga_position,
    DROP CONSTRAINT sagas_next_step_check;
ALTER TABLE saga_steps
    ALTER seq TYPE step_number, ALTER direction TYPE step_direction, ALTER state TYPE step_state, ALTER attempts TYPE step_attempts,
    DROP CONSTRAINT saga_steps_seq_check, DROP CONSTRAINT saga_steps_direction_check, DROP CONSTRAINT saga_steps_state_check,
    DROP CONSTRAINT saga_steps_attempts_check;

-- NOT VALID: the rows that are there have passed the same checks, and reading them all again would hold up every job.
ALTER DOMAIN job_kind ADD CONSTRAINT job_kind_length CHECK (length(VALUE) BETWEEN 1 AND 64) NOT VALID;
ALTER DOMAIN queue_name ADD CONSTRAINT queue_name_letters CHECK (VALUE ~ '^[A-Za-z0-9_.-]{1,64}$') NOT VALID;
ALTER DOMAIN job_priority ADD CONSTRAINT job_priority_range CHECK (VALUE BETWEEN 0 AND 9) NOT VALID;
ALTER DOMAIN job_attempts_allowed ADD CONSTRAINT job_attempts_allowed_positive CHECK (VALUE > 0) NOT VALID;
ALTER DOMAIN job_timeout_ms ADD CONSTRAINT job_timeout_ms_positive CHECK (VALUE > 0) NOT VALID;
ALTER DOMAIN saga_position ADD CONSTRAINT saga_position_not_negative CHECK (VALUE >= 0) NOT VALID;
ALTER DOMAIN step_number ADD CONSTRAINT step_number_not_negative CHECK (VALUE >= 0) NOT VALID;
ALTER DOMAIN step_direction ADD CONSTRAINT step_direction_known CHECK (VALUE IN ('execute', 'compensate')) NOT VALID;
ALTER DOMAIN step_state ADD CONSTRAINT step_state_known CHECK (VALUE IN ('succeeded', 'failed')) NOT VALID;
ALTER DOMAIN step_attempts ADD CONSTRAINT step_attempts_positive CHECK (VALUE > 0) NOT VALID;
