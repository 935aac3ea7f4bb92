-- Limits of depth, and drains, hold for SQL's enqueue too.

-- Queues, and tenants in a queue, that have as many jobs waiting as they may. How many wait is known to Redis; the relay, which
-- sees every job that comes by SQL, compares it with the limits about twice a second and writes here what is full. A row
-- that its writer doesn't renew is void: without a relay nothing is refused.
CREATE TABLE refusals (
    queue  text NOT NULL,
    -- '*': all of the queue's.
    tenant text NOT NULL,
    until  timestamptz NOT NULL,
    PRIMARY KEY (queue, tenant)
);

-- With the rights of its owner, so that roles that may enqueue need no more than before.
CREATE FUNCTION refuse_if_full(wanted text, caller text) RETURNS void LANGUAGE plpgsql STABLE SECURITY DEFINER AS $$
DECLARE
    whose text;
BEGIN
    IF EXISTS (SELECT FROM queue_policies WHERE queue = wanted AND draining_at IS NOT NULL) THEN
        RAISE EXCEPTION 'queue % takes no new jobs: it is drained', wanted
            USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = 'queue_draining';
    END IF;
    SELECT tenant INTO whose FROM refusals
    WHERE queue = wanted AND tenant IN ('*', caller) AND until > clock_timestamp() ORDER BY tenant = '*' DESC LIMIT 1;
    IF whose IS NOT NULL THEN
        RAISE EXCEPTION 'queue %: as many jobs wait as may%', wanted, CASE whose WHEN '*' THEN '' ELSE ' of tenant ' || whose END
            USING ERRCODE = 'configuration_limit_exceeded',
                  DETAIL = CASE whose WHEN '*' THEN 'queue_full' ELSE 'tenant_full' END,
                  HINT = 'Roll back, and try again in 5 s.';
    END IF;
END $$;
-- A caller's own temporary tables must not stand in for ours.
DO $$ BEGIN
    EXECUTE format('ALTER FUNCTION refuse_if_full(text, text) SET search_path = %I, pg_temp', current_schema());
END $$;

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
                  AND j.id = k.job_id AND j.finished_at + k.after_end <= clock_timestamp();
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
