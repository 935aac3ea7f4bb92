-- Documents, their versions and the pieces of a version.

CREATE TABLE documents (
    id              uuid PRIMARY KEY,
    tenant          text NOT NULL REFERENCES tenants (id),
    -- The caller's own name for the document, unique within its tenant.
    key             text NOT NULL CHECK (length(key) BETWEEN 1 AND 512),
    current_version uuid,
    -- Order number of the job whose version readers see (PROTOCOL.md 8).
    current_order   bigint NOT NULL DEFAULT 0,
    -- The last order number given out; only grows.
    last_order      bigint NOT NULL DEFAULT 0,
    -- Tombstone: the order number of the last delete (PROTOCOL.md 9).
    deleted_order   bigint,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    UNIQUE (tenant, key),
    CHECK (current_order <= last_order),
    CHECK (deleted_order IS NULL OR current_version IS NULL OR current_order > deleted_order)
);

CREATE TABLE document_versions (
    id            uuid PRIMARY KEY,
    document_id   uuid NOT NULL REFERENCES documents (id),
    tenant        text NOT NULL REFERENCES tenants (id),
    doc_order     bigint NOT NULL,
    -- The one saga run this version belongs to (PROTOCOL.md 6).
    saga_id       uuid NOT NULL UNIQUE,
    state         text NOT NULL CHECK (state IN ('staged', 'published', 'retired', 'abandoned', 'erased')),
    title         text,
    body          text,
    metadata      jsonb NOT NULL DEFAULT '{}',
    -- SHA-256 of the body as UTF-8.
    content_hash  bytea NOT NULL CHECK (octet_length(content_hash) = 32),
    model         text NOT NULL,
    dimensions    integer NOT NULL CHECK (dimensions > 0),
    collection    text NOT NULL,
    chunk_count   integer NOT NULL CHECK (chunk_count > 0),
    -- SHA-256 over every chunk number and its vector's bytes, recorded at publish for the auditor.
    vectors_hash  bytea CHECK (octet_length(vectors_hash) = 32),
    created_at    timestamptz NOT NULL DEFAULT now(),
    published_at  timestamptz,
    -- When the janitor next removes this version's points and cache entry; null while readers may see it.
    sweep_after   timestamptz,
    sweeps        smallint NOT NULL DEFAULT 0,
    -- The saga whose publish replaced this version and whose `retire` step waits for the first sweep.
    retired_by    uuid,
    CHECK (state <> 'published' OR (vectors_hash IS NOT NULL AND published_at IS NOT NULL)),
    CHECK (state IN ('staged', 'published') = (sweep_after IS NULL)),
    CHECK (body IS NOT NULL OR state NOT IN ('staged', 'published'))
);
CREATE INDEX document_versions_document ON document_versions (document_id);
CREATE UNIQUE INDEX document_versions_one_published ON document_versions (document_id) WHERE state = 'published';
CREATE INDEX document_versions_sweep ON document_versions (sweep_after) WHERE sweep_after IS NOT NULL;

ALTER TABLE documents ADD CONSTRAINT documents_current_version
    FOREIGN KEY (current_version) REFERENCES document_versions (id);
CREATE INDEX documents_current_version ON documents (current_version) WHERE current_version IS NOT NULL;

CREATE TABLE chunks (
    version_id uuid NOT NULL REFERENCES document_versions (id) ON DELETE CASCADE,
    no         integer NOT NULL CHECK (no >= 0),
    body       text NOT NULL,
    PRIMARY KEY (version_id, no)
);
