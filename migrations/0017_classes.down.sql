DROP TABLE class_counting;
DROP TABLE class_counts;
ALTER TABLE tenants DROP COLUMN class;
