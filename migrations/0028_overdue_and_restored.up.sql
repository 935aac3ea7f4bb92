-- Since when a version's sweep has been due, if the janitor had to put it off: what can't be swept for long is overdue, however
-- often it was tried.
ALTER TABLE document_versions ADD COLUMN sweep_missed timestamptz;
ALTER TABLE document_versions ALTER COLUMN sweep_missed SET STATISTICS 10;

-- Events are told in the order of their transactions' ids, which a cluster counts for itself: a restore into another one begins again
-- from below. So each restore adds to the ids, by more than any cluster has transactions: then what is told later comes after
-- whatever was told before, and a cursor from before is known by being too low.
ALTER TABLE events_expired ADD COLUMN ahead bigint NOT NULL DEFAULT 0;
ALTER TABLE events_expired ALTER COLUMN ahead SET STATISTICS 10;

-- What a transaction's id counts as among the events.
CREATE FUNCTION events_tx(tx xid8) RETURNS xid8 LANGUAGE sql STABLE SET search_path FROM CURRENT AS $$
    SELECT (events_tx.tx::text::bigint + x.ahead)::text::xid8 FROM events_expired x
$$;

-- To be called once the ledger's database was restored, before anything writes. All cursors end: what they stand for may not have
-- happened here.
CREATE FUNCTION after_restore() RETURNS void LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    more CONSTANT bigint := 1::bigint << 50;
BEGIN
    UPDATE events_expired x SET ahead = x.ahead + more, tx = (x.ahead + more)::text::xid8, id = 0;
    TRUNCATE events;
END $$;

CREATE OR REPLACE FUNCTION tell_document_event() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    NEW.event_tx := greatest(events_tx(pg_current_xact_id()), OLD.event_tx);
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
    until   xid8 := events_tx(pg_snapshot_xmin(pg_current_snapshot()));
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
    SELECT events_tx(pg_snapshot_xmin(pg_current_snapshot()))::text || '-0'
$$;
