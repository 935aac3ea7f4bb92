-- A job's first run, of a saga that can be asked for its data again, is written to the log only when the log has to know more of it
-- than the job does: that it ended, turned, waits, was announced or taken again. Until then this is all there is of it, besides the
-- job's first fence: its definition's version. Its id is the job's. See docs/decisions/0049-the-first-row-of-a-run-can-wait.md.
ALTER TABLE jobs ADD COLUMN begun_version integer;

-- Every run, also one that has no row yet.
CREATE VIEW saga_runs AS
SELECT id, job_id, kind::text AS kind, definition_version, tenant, state, next_step::smallint AS next_step, verdict, error, created_at, updated_at,
       finished_at, resolved_at, resolved_by, resolution
FROM sagas
UNION ALL
SELECT j.id, j.id, j.kind::text, j.begun_version, j.tenant, 'running', 0::smallint, NULL, NULL, j.taken_at, j.taken_at, NULL, NULL, NULL, NULL
FROM jobs j
WHERE j.state = 'running' AND j.fence = 1 AND j.begun_version IS NOT NULL AND NOT EXISTS (SELECT FROM sagas s WHERE s.id = j.id);
