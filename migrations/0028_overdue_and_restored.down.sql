CREATE OR REPLACE FUNCTION tell_document_event() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    NEW.event_tx := greatest(pg_current_xact_id(), OLD.event_tx);
    INSERT INTO events (tx, tenant, event, document, document_id, version, doc_order)
    VALUES (NEW.event_tx, NEW.tenant,
            CASE WHEN NEW.current_version IS NULL THEN 'document.deleted' ELSE 'document.published' END,
            NEW.key, NEW.id, coalesce(NEW.current_version, OLD.current_version), NEW.current_order);
    RETURN NEW;
END $$;

CREATE OR REPLACE FUNCTION events_after(after text DEFAULT '0-0', tenant text DEFAULT NULL, most integer DEFAULT 100)
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

CREATE OR REPLACE FUNCTION events_now() RETURNS text LANGUAGE sql STABLE SET search_path FROM CURRENT AS $$
    SELECT pg_snapshot_xmin(pg_current_snapshot())::text || '-0'
$$;

DROP FUNCTION after_restore();
DROP FUNCTION events_tx(xid8);
-- Where the ledger was restored, its events begin again with the cluster's own ids.
UPDATE documents d SET event_tx = NULL FROM events_expired x WHERE x.ahead > 0 AND d.event_tx IS NOT NULL;
DELETE FROM events e USING events_expired x WHERE x.ahead > 0;
UPDATE events_expired SET tx = pg_current_xact_id(), id = 0 WHERE ahead > 0;
ALTER TABLE events_expired DROP COLUMN ahead;
ALTER TABLE document_versions DROP COLUMN sweep_missed;
