-- ANALYZE reads 300 rows for each unit of the largest target of a table's columns, and sorts each column of them: 30,000 rows by default,
-- each time a table has grown by a tenth or a fifth. No query of Flotilla looks into a payload or needs a hundred common values: see
-- docs/decisions/0051-fewer-statistics.md. Partitions of the audit log are left as they are: they grow with what people do.
DO $$
DECLARE
    one record;
BEGIN
    FOR one IN
        SELECT a.attrelid::regclass AS relation, a.attname AS name,
               CASE WHEN a.atttypid IN ('jsonb'::regtype, 'bytea'::regtype) THEN 0 ELSE 10 END AS target
        FROM pg_attribute a JOIN pg_class r ON r.oid = a.attrelid
        WHERE r.relnamespace = 'flotilla'::regnamespace AND r.relkind = 'r' AND NOT r.relispartition
          AND r.relname <> '_sqlx_migrations' AND a.attnum > 0 AND NOT a.attisdropped
    LOOP
        EXECUTE format('ALTER TABLE %s ALTER COLUMN %I SET STATISTICS %s', one.relation, one.name, one.target);
    END LOOP;
END $$;
