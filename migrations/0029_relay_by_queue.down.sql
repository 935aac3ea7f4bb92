DROP INDEX jobs_undispatched;
CREATE INDEX jobs_undispatched ON jobs (priority DESC, created_at) WHERE dispatched_at IS NULL AND state = 'waiting';
