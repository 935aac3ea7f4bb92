DROP FUNCTION uuid7();
DROP TABLE api_keys;
DROP TABLE tenants;
DROP TABLE ledger;
