-- The fence of the delivery that a run had come to when a person last had it go on: how often a compensation was put off counts from
-- there.
ALTER TABLE sagas ADD COLUMN retried_fence bigint NOT NULL DEFAULT 0;
ALTER TABLE sagas ALTER COLUMN retried_fence SET STATISTICS 10;
