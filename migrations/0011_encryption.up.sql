-- Which key a payload or a result is sealed with; null: it is plain.
ALTER TABLE jobs ADD COLUMN payload_key_id text, ADD COLUMN result_key_id text;
ALTER TABLE dead_letters ADD COLUMN payload_key_id text;
