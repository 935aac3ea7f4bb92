-- An older worker looks for the run of a job that it takes again in the log alone. A job that is not taken yet has none.
INSERT INTO sagas (id, job_id, kind, definition_version, tenant, state, fence, created_at)
SELECT id, id, kind, begun_version, tenant, 'running', fence, coalesce(taken_at, now()) FROM jobs
WHERE state IN ('waiting', 'running') AND fence > 0 AND begun_version IS NOT NULL
ON CONFLICT DO NOTHING;
DROP VIEW saga_runs;
ALTER TABLE jobs DROP COLUMN begun_version;
