-- The relay goes from queue to queue, so that one whose window is full is passed over however many of its jobs wait, and within a queue
-- and priority by when jobs are due, so that those of a full schedule are. See docs/decisions/0058-the-relay-goes-from-queue-to-queue.md.
DROP INDEX jobs_undispatched;
CREATE INDEX jobs_undispatched ON jobs (queue, priority, run_at) WHERE dispatched_at IS NULL AND state = 'waiting';
