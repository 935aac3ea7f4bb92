-- Null: the run's data is what its definition makes of the job, and nothing has been added yet. So the take can begin runs.
ALTER TABLE sagas ALTER COLUMN data DROP NOT NULL;
