DROP TRIGGER sagas_transitions ON sagas;
DROP TRIGGER jobs_transitions ON jobs;
DROP FUNCTION refuse_transition();
