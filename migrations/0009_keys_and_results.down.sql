DROP FUNCTION enqueue(text, jsonb, text, integer, text, timestamptz, integer, integer, text, text, interval, text);
CREATE FUNCTION enqueue(
    kind            text,
    payload         jsonb,
    tenant          text,
    priority        integer DEFAULT 5,
    queue           text DEFAULT NULL,
    run_at          timestamptz DEFAULT NULL,
    max_attempts    integer DEFAULT 5,
    timeout_ms      integer DEFAULT 300000,
    idempotency_key text DEFAULT NULL,
    traceparent     text DEFAULT NULL
) RETURNS uuid LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    job   uuid := uuid7();
    known record;
    doc   uuid;
    num   bigint;
    print bytea := sha256(convert_to(enqueue.kind || E'\n' || enqueue.payload::text, 'UTF8'));
BEGIN
    IF idempotency_key IS NOT NULL THEN
        INSERT INTO idempotency_keys AS k (tenant, scope, key, fingerprint, job_id, expires_at)
        VALUES (enqueue.tenant, 'sql', enqueue.idempotency_key, print, job, now() + interval '24 hours')
        ON CONFLICT (tenant, scope, key) DO UPDATE
            SET fingerprint = EXCLUDED.fingerprint, job_id = EXCLUDED.job_id, expires_at = EXCLUDED.expires_at
            WHERE k.expires_at <= now();
        IF NOT FOUND THEN
            SELECT k.job_id, k.fingerprint INTO known FROM idempotency_keys k
            WHERE k.tenant = enqueue.tenant AND k.scope = 'sql' AND k.key = enqueue.idempotency_key;
            IF known.fingerprint <> print THEN
                RAISE EXCEPTION 'idempotency key % was used with another request', idempotency_key
                    USING ERRCODE = 'unique_violation';
            END IF;
            RETURN known.job_id;
        END IF;
    END IF;
    IF enqueue.kind IN ('ingest', 'delete') THEN
        IF coalesce(enqueue.payload ->> 'document', '') = '' THEN
            RAISE EXCEPTION 'payload.document is required for kind %', enqueue.kind USING ERRCODE = 'invalid_parameter_value';
        END IF;
        INSERT INTO documents AS d (id, tenant, key, last_order)
        VALUES (uuid7(), enqueue.tenant, enqueue.payload ->> 'document', 1)
        ON CONFLICT (tenant, key) DO UPDATE SET last_order = d.last_order + 1
        RETURNING d.id, d.last_order INTO doc, num;
    END IF;
    INSERT INTO jobs (id, kind, queue, priority, tenant, payload, run_at, max_attempts, timeout_ms, document_id, doc_order, traceparent)
    VALUES (job, enqueue.kind, coalesce(enqueue.queue, enqueue.kind), enqueue.priority, enqueue.tenant, enqueue.payload,
            coalesce(enqueue.run_at, now()), enqueue.max_attempts, enqueue.timeout_ms, doc, num, enqueue.traceparent);
    RETURN job;
END $$;

DROP INDEX jobs_results;
-- A key that is held until its job has ended has no end of its own: it is free from here on.
DELETE FROM idempotency_keys WHERE after_end IS NOT NULL;
ALTER TABLE idempotency_keys DROP COLUMN after_end;
