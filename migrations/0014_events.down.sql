DROP FUNCTION events_now();
DROP FUNCTION events_after(text, text, integer);
DROP TRIGGER documents_events ON documents;
DROP FUNCTION tell_document_event();
DROP TABLE events_expired;
DROP TABLE events;
ALTER TABLE documents DROP COLUMN event_tx;
