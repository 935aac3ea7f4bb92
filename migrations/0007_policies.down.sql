DROP TABLE tenant_policies;
DROP TABLE queue_policies;
DROP FUNCTION next_policy_revision();
DROP SEQUENCE policy_revisions;
