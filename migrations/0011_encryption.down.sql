-- Sealed payloads stay sealed and would be taken for plain ones: refuse, rather than run jobs on them.
DO $$ BEGIN
    IF EXISTS (SELECT FROM jobs WHERE payload_key_id IS NOT NULL AND state IN ('waiting', 'running'))
       OR EXISTS (SELECT FROM dead_letters WHERE payload_key_id IS NOT NULL AND state = 'open') THEN
        RAISE EXCEPTION 'there are unfinished jobs or open dead letters with sealed payloads: let them end first';
    END IF;
END $$;
ALTER TABLE dead_letters DROP COLUMN payload_key_id;
ALTER TABLE jobs DROP COLUMN result_key_id, DROP COLUMN payload_key_id;
