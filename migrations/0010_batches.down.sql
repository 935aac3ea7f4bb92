DROP TABLE job_progress;
DROP TRIGGER jobs_batch_ended ON jobs;
DROP TRIGGER jobs_batch_added ON jobs;
DROP FUNCTION count_batch_member();
DROP TABLE batch_events;
ALTER TABLE jobs DROP COLUMN batch_id;
DROP TABLE batches;
