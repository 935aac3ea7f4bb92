-- Events: what other services have to know of documents, as an outbox that each reads at its own pace.
--
-- A reader asks for what comes after its cursor, and must never miss what commits later under a number drawn earlier. So an
-- event carries its transaction, and is shown only once no transaction is under way that could still add one before it.

-- The greatest `tx` of the document's events. An event gets at least that, so that the events of one document come in the order
-- in which readers saw the changes, whichever transaction began first.
ALTER TABLE documents ADD COLUMN event_tx xid8;

CREATE TABLE events (
    tx          xid8 NOT NULL,
    id          bigint GENERATED ALWAYS AS IDENTITY,
    at          timestamptz NOT NULL DEFAULT now(),
    tenant      text NOT NULL,
    event       text NOT NULL CHECK (event IN ('document.published', 'document.deleted')),
    document    text NOT NULL,
    document_id uuid NOT NULL,
    -- What readers see from now on; of a deletion, what they saw before.
    version     uuid NOT NULL,
    doc_order   bigint NOT NULL,
    PRIMARY KEY (tx, id)
);
CREATE INDEX events_tenant ON events (tenant, tx, id);

-- The last event that retention has removed: a reader whose cursor lies before it has missed something.
CREATE TABLE events_expired (
    one  boolean PRIMARY KEY DEFAULT true CHECK (one),
    tx   xid8 NOT NULL,
    id   bigint NOT NULL
);
INSERT INTO events_expired (tx, id) VALUES ('0', 0);

-- Whichever statement changes what readers see, tells.
CREATE FUNCTION tell_document_event() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    NEW.event_tx := greatest(pg_current_xact_id(), OLD.event_tx);
    INSERT INTO events (tx, tenant, event, document, document_id, version, doc_order)
    VALUES (NEW.event_tx, NEW.tenant,
            CASE WHEN NEW.current_version IS NULL THEN 'document.deleted' ELSE 'document.published' END,
            NEW.key, NEW.id, coalesce(NEW.current_version, OLD.current_version), NEW.current_order);
    RETURN NEW;
END $$;
CREATE TRIGGER documents_events BEFORE UPDATE OF current_version ON documents
    FOR EACH ROW WHEN (OLD.current_version IS DISTINCT FROM NEW.current_version)
    EXECUTE FUNCTION tell_document_event();

-- Events after a cursor, the oldest first, at most `most` (10,000 at most); of one tenant, or of all. The cursor of an event is
-- what to ask with next; '0-0' begins with the oldest event kept. Fails with SQLSTATE FT001 if events after the cursor were
-- removed by retention, and with 22023 if it is no cursor.
CREATE FUNCTION events_after(after text DEFAULT '0-0', tenant text DEFAULT NULL, most integer DEFAULT 100)
RETURNS TABLE (
    cursor text, at timestamptz, event text, owner text, document text, document_id uuid, version uuid, doc_order bigint
) LANGUAGE plpgsql STABLE SET search_path FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    from_tx xid8;
    from_id bigint;
    until   xid8 := pg_snapshot_xmin(pg_current_snapshot());
BEGIN
    IF events_after.after !~ '^[0-9]{1,19}-[0-9]{1,18}$' THEN
        RAISE EXCEPTION '% is no cursor of events', events_after.after USING ERRCODE = 'invalid_parameter_value';
    END IF;
    from_tx := split_part(events_after.after, '-', 1)::xid8;
    from_id := split_part(events_after.after, '-', 2)::bigint;
    IF events_after.after <> '0-0' AND EXISTS (SELECT FROM events_expired x WHERE (x.tx, x.id) > (from_tx, from_id)) THEN
        RAISE EXCEPTION 'events after % were removed by retention', events_after.after USING ERRCODE = 'FT001';
    END IF;
    IF events_after.tenant IS NULL THEN
        RETURN QUERY SELECT e.tx::text || '-' || e.id, e.at, e.event, e.tenant, e.document, e.document_id, e.version, e.doc_order
            FROM events e WHERE (e.tx, e.id) > (from_tx, from_id) AND e.tx < until
            ORDER BY e.tx, e.id LIMIT least(events_after.most, 10000);
    ELSE
        RETURN QUERY SELECT e.tx::text || '-' || e.id, e.at, e.event, e.tenant, e.document, e.document_id, e.version, e.doc_order
            FROM events e WHERE e.tenant = events_after.tenant AND (e.tx, e.id) > (from_tx, from_id) AND e.tx < until
            ORDER BY e.tx, e.id LIMIT least(events_after.most, 10000);
    END IF;
END $$;

-- The cursor of now: what is committed later comes after it.
CREATE FUNCTION events_now() RETURNS text LANGUAGE sql STABLE SET search_path FROM CURRENT AS $$
    SELECT pg_snapshot_xmin(pg_current_snapshot())::text || '-0'
$$;
