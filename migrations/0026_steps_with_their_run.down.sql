-- The view's tables with it: no run may be completed between the copy and the column's end.
LOCK TABLE saga_timeline IN ACCESS EXCLUSIVE MODE;
INSERT INTO saga_steps (saga_id, fence, seq, step_name, direction, state, attempts, started_at, ended_at, error)
SELECT t.saga_id, t.fence, t.seq, t.step_name, t.direction, t.state, t.attempts, t.started_at, t.ended_at, t.error
FROM saga_timeline t JOIN sagas s ON s.id = t.saga_id AND s.steps IS NOT NULL
ON CONFLICT DO NOTHING;
DROP VIEW saga_timeline;
ALTER TABLE sagas DROP COLUMN steps;
