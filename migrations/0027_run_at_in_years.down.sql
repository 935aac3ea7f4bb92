CREATE OR REPLACE FUNCTION enqueue(
    kind              text,
    payload           jsonb,
    tenant            text,
    priority          integer DEFAULT 5,
    queue             text DEFAULT NULL,
    run_at            timestamptz DEFAULT NULL,
    max_attempts      integer DEFAULT 5,
    timeout_ms        integer DEFAULT 300000,
    idempotency_key   text DEFAULT NULL,
    traceparent       text DEFAULT NULL,
    idempotency_ttl   interval DEFAULT '24 hours',
    -- 'accepted': the key is held for idempotency_ttl from now. 'finished': until the job has ended, and then for
    -- idempotency_ttl.
    idempotency_until text DEFAULT 'accepted'
) RETURNS uuid LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    job     uuid := uuid7();
    known   record;
    doc     uuid;
    num     bigint;
    print   bytea := sha256(convert_to(enqueue.kind || E'\n' || enqueue.payload::text, 'UTF8'));
    after   interval := CASE WHEN idempotency_until = 'finished' THEN idempotency_ttl END;
    expires timestamptz := CASE WHEN idempotency_until = 'finished' THEN 'infinity' ELSE now() + idempotency_ttl END;
BEGIN
    IF jsonb_path_exists(payload, 'strict $.**{126 to last} ? (@.type() == "object" || @.type() == "array")') THEN
        RAISE EXCEPTION 'payload: nested deeper than 126 levels' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF idempotency_key IS NOT NULL THEN
        IF idempotency_until NOT IN ('accepted', 'finished') THEN
            RAISE EXCEPTION 'idempotency_until is %: accepted and finished are allowed', idempotency_until
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
        INSERT INTO idempotency_keys AS k (tenant, scope, key, fingerprint, job_id, expires_at, after_end)
        VALUES (enqueue.tenant, 'sql', enqueue.idempotency_key, print, job, expires, after)
        ON CONFLICT (tenant, scope, key) DO UPDATE
            SET fingerprint = EXCLUDED.fingerprint, job_id = EXCLUDED.job_id, expires_at = EXCLUDED.expires_at,
                after_end = EXCLUDED.after_end
            WHERE k.expires_at <= now();
        IF NOT FOUND THEN
            SELECT k.job_id, k.fingerprint, k.after_end INTO known FROM idempotency_keys k
            WHERE k.tenant = enqueue.tenant AND k.scope = 'sql' AND k.key = enqueue.idempotency_key;
            IF known.after_end IS NOT NULL THEN
                -- Only here is a job read, so that callers who never hold keys until the end need no right to.
                UPDATE idempotency_keys k
                SET fingerprint = print, job_id = job, expires_at = expires, after_end = after
                FROM jobs j
                WHERE k.tenant = enqueue.tenant AND k.scope = 'sql' AND k.key = enqueue.idempotency_key
                  AND j.id = k.job_id AND j.finished_at + k.after_end <= clock_timestamp() AND NOT is_parked(j.id);
                -- Another may have been quicker.
                SELECT k.job_id, k.fingerprint, k.after_end INTO known FROM idempotency_keys k
                WHERE k.tenant = enqueue.tenant AND k.scope = 'sql' AND k.key = enqueue.idempotency_key;
            END IF;
            IF known.fingerprint <> print THEN
                RAISE EXCEPTION 'idempotency key % was used with another request', idempotency_key
                    USING ERRCODE = 'unique_violation';
            END IF;
            IF known.job_id <> job THEN
                RETURN known.job_id;
            END IF;
        END IF;
    END IF;
    PERFORM refuse_if_full(coalesce(enqueue.queue, enqueue.kind), enqueue.tenant);
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
