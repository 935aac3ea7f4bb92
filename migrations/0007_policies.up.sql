-- What people set for queues and tenants: pause, mode, weights, limits. Redis holds a copy (PROTOCOL.md 17), which the
-- loop `policies` keeps in step by revision. No row is ever deleted: a revision that was seen must not come back.

CREATE SEQUENCE policy_revisions;

CREATE TABLE queue_policies (
    queue           text PRIMARY KEY CHECK (queue ~ '^[A-Za-z0-9_.-]{1,64}$'),
    -- Nothing is claimed since then.
    paused_at       timestamptz,
    -- Nothing new is accepted since then.
    draining_at     timestamptz,
    mode            text NOT NULL DEFAULT 'strict' CHECK (mode IN ('strict', 'weighted')),
    -- Of priorities 0 to 9.
    weights         smallint[] CHECK (cardinality(weights) = 10 AND array_position(weights, NULL) IS NULL
                                      AND 1 <= ALL (weights) AND 100 >= ALL (weights)),
    max_concurrency integer CHECK (max_concurrency > 0),
    rate_per_s      double precision CHECK (rate_per_s > 0 AND rate_per_s < 'infinity'),
    burst           integer CHECK (burst > 0),
    max_depth       bigint CHECK (max_depth > 0),
    revision        bigint NOT NULL UNIQUE,
    updated_at      timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT queue_policies_weighted CHECK ((mode = 'weighted') = (weights IS NOT NULL)),
    CONSTRAINT queue_policies_rate CHECK ((rate_per_s IS NULL) = (burst IS NULL))
);

CREATE TABLE tenant_policies (
    tenant          text NOT NULL REFERENCES tenants (id),
    -- '*': every queue, each by itself. A row of the queue's own wins as a whole.
    queue           text NOT NULL CHECK (queue = '*' OR queue ~ '^[A-Za-z0-9_.-]{1,64}$'),
    paused_at       timestamptz,
    weight          smallint NOT NULL DEFAULT 1 CHECK (weight BETWEEN 1 AND 100),
    max_concurrency integer CHECK (max_concurrency > 0),
    rate_per_s      double precision CHECK (rate_per_s > 0 AND rate_per_s < 'infinity'),
    burst           integer CHECK (burst > 0),
    max_depth       bigint CHECK (max_depth > 0),
    -- As if the row were not there.
    removed_at      timestamptz,
    revision        bigint NOT NULL UNIQUE,
    updated_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, queue),
    CONSTRAINT tenant_policies_rate CHECK ((rate_per_s IS NULL) = (burst IS NULL))
);

-- Revisions are given under a lock that is held until the commit, so that they become visible in their order: whoever has
-- seen one has seen all before it.
CREATE FUNCTION next_policy_revision() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('flotilla.policies'));
    NEW.revision := nextval('policy_revisions');
    NEW.updated_at := now();
    RETURN NEW;
END $$;

CREATE TRIGGER queue_policies_revision BEFORE INSERT OR UPDATE ON queue_policies
    FOR EACH ROW EXECUTE FUNCTION next_policy_revision();
CREATE TRIGGER tenant_policies_revision BEFORE INSERT OR UPDATE ON tenant_policies
    FOR EACH ROW EXECUTE FUNCTION next_policy_revision();
