DROP TABLE dead_letters;
DROP TABLE saga_steps;
DROP TABLE sagas;
