-- An older worker that finds such a run unfinished can't read this, and parks it.
UPDATE sagas SET data = '{}' WHERE data IS NULL;
ALTER TABLE sagas ALTER COLUMN data SET NOT NULL;
