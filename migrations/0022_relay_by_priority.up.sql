-- The relay takes the highest priority first, and of each at least a few: behind a large batch an urgent job does not wait for all of it.
DROP INDEX jobs_undispatched;
CREATE INDEX jobs_undispatched ON jobs (priority DESC, created_at) WHERE dispatched_at IS NULL AND state = 'waiting';
