DROP TRIGGER tenants_keep_names ON tenants;
DROP TRIGGER tenants_keep_jobs ON tenants;
DROP TRIGGER jobs_tenant_known ON jobs;
DROP TRIGGER jobs_delete_runs ON jobs;
DROP TRIGGER sagas_delete_steps ON sagas;
DROP FUNCTION refuse_to_orphan_jobs();
DROP FUNCTION refuse_jobs_of_nobody();
DROP FUNCTION delete_runs();
DROP FUNCTION delete_steps();
ALTER TABLE jobs ADD CONSTRAINT jobs_tenant_fkey FOREIGN KEY (tenant) REFERENCES tenants (id);
ALTER TABLE sagas
    ADD CONSTRAINT sagas_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id) ON DELETE CASCADE,
    ADD CONSTRAINT sagas_tenant_fkey FOREIGN KEY (tenant) REFERENCES tenants (id);
ALTER TABLE saga_steps ADD CONSTRAINT saga_steps_saga_id_fkey FOREIGN KEY (saga_id) REFERENCES sagas (id) ON DELETE CASCADE;
