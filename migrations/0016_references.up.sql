-- The busiest references, held without a look at the other table for every row. A foreign key runs a query of its own for each
-- inserted row and locks the row it finds: for a saga of three steps that was more than all its other work in the ledger, and
-- all jobs of a tenant locked that tenant's one row. See docs/decisions/0045-references-of-the-log.md.

-- A run, and its steps, are only written by statements that hold their job's row locked under its fence, so the job is there;
-- they go away with it.
ALTER TABLE sagas DROP CONSTRAINT sagas_job_id_fkey, DROP CONSTRAINT sagas_tenant_fkey;
ALTER TABLE saga_steps DROP CONSTRAINT saga_steps_saga_id_fkey;

CREATE FUNCTION delete_runs() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    DELETE FROM sagas s USING gone WHERE s.job_id = gone.id;
    RETURN NULL;
END $$;
CREATE TRIGGER jobs_delete_runs AFTER DELETE ON jobs REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION delete_runs();

CREATE FUNCTION delete_steps() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    DELETE FROM saga_steps t USING gone WHERE t.saga_id = gone.id;
    RETURN NULL;
END $$;
CREATE TRIGGER sagas_delete_steps AFTER DELETE ON sagas REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION delete_steps();

-- A job's tenant: looked up once for each statement instead of once for each row.
ALTER TABLE jobs DROP CONSTRAINT jobs_tenant_fkey;

CREATE FUNCTION refuse_jobs_of_nobody() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    nobody text;
BEGIN
    SELECT a.tenant INTO nobody FROM (SELECT DISTINCT tenant FROM added) a
    WHERE NOT EXISTS (SELECT FROM tenants t WHERE t.id = a.tenant) LIMIT 1;
    IF FOUND THEN
        RAISE foreign_key_violation USING MESSAGE = format('there is no tenant %L', nobody), TABLE = 'jobs', COLUMN = 'tenant';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER jobs_tenant_known AFTER INSERT ON jobs REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_jobs_of_nobody();

-- Rare, and so it may wait for everybody who adds jobs.
CREATE FUNCTION refuse_to_orphan_jobs() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    LOCK TABLE jobs IN SHARE ROW EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM jobs j WHERE j.tenant = OLD.id) THEN
        RAISE foreign_key_violation USING MESSAGE = format('tenant %L has jobs', OLD.id), TABLE = 'tenants', COLUMN = 'id';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER tenants_keep_jobs AFTER DELETE ON tenants FOR EACH ROW EXECUTE FUNCTION refuse_to_orphan_jobs();
CREATE TRIGGER tenants_keep_names AFTER UPDATE OF id ON tenants
    FOR EACH ROW WHEN (NEW.id <> OLD.id) EXECUTE FUNCTION refuse_to_orphan_jobs();

-- With the rights of their owner, as a foreign key looks: roles that may enqueue need no right to read tenants. A caller's own
-- temporary tables must not stand in for ours.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['delete_runs', 'delete_steps', 'refuse_jobs_of_nobody', 'refuse_to_orphan_jobs'] LOOP
        EXECUTE format('ALTER FUNCTION %I() SET search_path = %I, pg_temp', name, current_schema());
    END LOOP;
END $$;
