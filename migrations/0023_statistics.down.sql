DO $$
DECLARE
    one record;
BEGIN
    FOR one IN
        SELECT a.attrelid::regclass AS relation, a.attname AS name
        FROM pg_attribute a JOIN pg_class r ON r.oid = a.attrelid
        WHERE r.relnamespace = 'flotilla'::regnamespace AND r.relkind = 'r' AND NOT r.relispartition
          AND r.relname <> '_sqlx_migrations' AND a.attnum > 0 AND NOT a.attisdropped
    LOOP
        EXECUTE format('ALTER TABLE %s ALTER COLUMN %I SET STATISTICS -1', one.relation, one.name);
    END LOOP;
END $$;
