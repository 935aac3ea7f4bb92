DROP FUNCTION enqueue(text, jsonb, text, integer, text, timestamptz, integer, integer, text, text);
