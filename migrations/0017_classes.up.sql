-- Classes of tenants: a label under which operators see what waits, runs and ends, where a label for each tenant would be too many.
ALTER TABLE tenants ADD COLUMN class text NOT NULL DEFAULT 'default' CHECK (class ~ '^[A-Za-z0-9_.-]{1,64}$');
CREATE INDEX tenants_class ON tenants (class) WHERE class <> 'default';

-- What the last count found, and whose turn the next one is: one process counts for the whole fleet.
CREATE TABLE class_counts (
    queue     text NOT NULL,
    class     text NOT NULL,
    waiting   bigint NOT NULL,
    -- Since when the oldest of them could have run.
    oldest_at timestamptz,
    running   bigint NOT NULL,
    -- Within the minute before.
    ended     bigint NOT NULL,
    PRIMARY KEY (queue, class)
);
CREATE TABLE class_counting (
    singleton  boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    counted_at timestamptz,
    next_at    timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO class_counting DEFAULT VALUES;
