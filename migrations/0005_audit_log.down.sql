DROP FUNCTION drop_audit_partitions(interval);
DROP FUNCTION ensure_audit_partitions(integer);
DROP TABLE audit_log;
