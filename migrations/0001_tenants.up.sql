-- Owners of jobs and documents, their API keys, and this ledger's identity.

CREATE TABLE ledger (
    -- One row: the id that stamps every Redis prefix that serves this ledger (PROTOCOL.md 25).
    singleton  boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    id         uuid NOT NULL DEFAULT gen_random_uuid(),
    created_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO ledger DEFAULT VALUES;

CREATE TABLE tenants (
    id          text PRIMARY KEY CHECK (id ~ '^[A-Za-z0-9_.-]{1,64}$'),
    -- Waiting jobs at which enqueue answers 429; null: the producer's default.
    max_waiting bigint CHECK (max_waiting > 0),
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE api_keys (
    id         uuid PRIMARY KEY,
    tenant     text NOT NULL REFERENCES tenants (id),
    name       text NOT NULL,
    -- SHA-256 of the key; the key itself is shown once and never stored.
    key_hash   bytea NOT NULL UNIQUE CHECK (octet_length(key_hash) = 32),
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz
);
CREATE INDEX api_keys_tenant ON api_keys (tenant);

-- UUIDv7 (RFC 9562) for rows that SQL itself makes: 48 bits of Unix milliseconds, then random bits.
CREATE FUNCTION uuid7() RETURNS uuid LANGUAGE sql VOLATILE AS $$
    SELECT encode(
        set_bit(set_bit(
            overlay(uuid_send(gen_random_uuid())
                    PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3)
                    FROM 1 FOR 6),
            52, 1), 53, 1), 'hex')::uuid
$$;
