DROP TABLE auditor;
DROP TRIGGER jobs_batch_reopened ON jobs;
DROP FUNCTION count_batch_member_again();
ALTER TABLE sagas DROP CONSTRAINT sagas_resolved, DROP COLUMN resolved_at, DROP COLUMN resolved_by, DROP COLUMN resolution;
