ALTER TABLE sagas DROP COLUMN pivot_at, DROP COLUMN done;
DROP TABLE job_signals;
DROP TABLE saga_waits;
