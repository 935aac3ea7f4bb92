DROP TABLE chunks;
ALTER TABLE documents DROP CONSTRAINT documents_current_version;
DROP TABLE document_versions;
DROP TABLE documents;
