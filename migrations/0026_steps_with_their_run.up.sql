-- The steps of the delivery that completed a run, in its own row: a row of their own for each was a fifth of what Postgres did for
-- the ledger's part of a saga. See docs/decisions/0054-steps-with-their-run.md.
--
-- An array per step, in the order in which they ended: name, tries, begin as microseconds since 1970, how many microseconds it took,
-- the last error or null.
ALTER TABLE sagas ADD COLUMN steps jsonb;
ALTER TABLE sagas ALTER COLUMN steps SET STATISTICS 0;

-- Every step of every run, wherever it is kept.
CREATE VIEW saga_timeline AS
SELECT saga_id, fence, seq::integer AS seq, step_name, direction::text AS direction, state::text AS state, attempts::integer AS attempts,
       started_at, ended_at, error
FROM saga_steps
UNION ALL
SELECT s.id, s.fence, (t.place - 1)::integer, t.step ->> 0, 'execute', CASE WHEN t.step ->> 4 IS NULL THEN 'succeeded' ELSE 'failed' END,
       (t.step ->> 1)::integer,
       timestamptz 'epoch' + (t.step ->> 2)::bigint * interval '1 microsecond',
       timestamptz 'epoch' + ((t.step ->> 2)::bigint + (t.step ->> 3)::bigint) * interval '1 microsecond',
       t.step ->> 4
FROM sagas s CROSS JOIN LATERAL jsonb_array_elements(s.steps) WITH ORDINALITY AS t (step, place);
