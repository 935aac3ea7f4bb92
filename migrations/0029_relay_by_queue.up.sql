-- The relay goes from queue to queue, so that one whose window is full is passed over however many of its jobs wait, and within a queue
-- and priority by when jobs are due, so that those of a full schedule are. See docs/decisions/0058-the-relay-goes-from-queue-to-queue.md.
DROP INDEX jobs_undispatched;
CREATE INDEX jobs_undispatched ON jobs (queue, priority, run_at) WHERE dispatched_at IS NULL AND state = 'waiting';

-- Postgres' times have ends that no client knows, 'infinity' among them: the function `enqueue` refuses them, and so does the column now,
-- whoever writes to it. Its type checks it, see docs/decisions/0048-checks-by-type.md.
CREATE DOMAIN job_time AS timestamptz;
ALTER TABLE jobs ALTER run_at TYPE job_time;
UPDATE jobs SET run_at = least(greatest(run_at, '1970-01-01 00:00Z'), '9999-12-31 23:59:59.999999Z')
WHERE run_at NOT BETWEEN '1970-01-01 00:00Z' AND '9999-12-31 23:59:59.999999Z';
-- Nobody has written since the lock that the new type took.
ALTER DOMAIN job_time ADD CONSTRAINT job_time_in_years
    CHECK (VALUE BETWEEN '1970-01-01 00:00Z' AND '9999-12-31 23:59:59.999999Z');
