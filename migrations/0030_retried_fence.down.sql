ALTER TABLE sagas DROP COLUMN retried_fence;
