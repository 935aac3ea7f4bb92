//! What each metric means. `deploy/prometheus/metrics.yaml` lists the same names with their labels.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// Gives every metric its help text.
pub fn describe() {
    describe_counter!("saga_executions_total", "Runs of sagas, by how the delivery ended.");
    describe_histogram!(
        "saga_step_duration_seconds",
        Unit::Seconds,
        "Time that a saga's step took, with its tries."
    );
    describe_counter!("saga_compensation_total", "Compensations of steps, by how they ended.");
    describe_gauge!("saga_active_count", "Sagas that run in this process now.");
    describe_counter!("redis_cache_hits_total", "Documents whose text was in the cache.");
    describe_counter!("redis_cache_misses_total", "Documents whose text was not in the cache.");
    describe_counter!(
        "redis_cache_invalidations_total",
        "Cache entries removed, by why, and changes announced, by their event."
    );
    describe_gauge!("queue_depth", "Jobs that are ready to be claimed.");
    describe_gauge!("queue_oldest_age_seconds", Unit::Seconds, "How long the oldest ready job has waited.");
    describe_gauge!("queue_in_flight", "Jobs that are leased to workers.");
    describe_gauge!("queue_class_depth", "Jobs of a class of tenants that may run.");
    describe_gauge!(
        "queue_class_oldest_age_seconds",
        Unit::Seconds,
        "How long the oldest of a class of tenants has waited."
    );
    describe_gauge!("queue_class_in_flight", "Jobs of a class of tenants that run.");
    describe_gauge!(
        "queue_class_ended_last_minute",
        "Jobs of a class of tenants that ended within a minute before they were counted."
    );
    describe_gauge!("queue_scheduled", "Jobs that wait for their time.");
    describe_counter!("queue_jobs_claimed_total", "Jobs that this process claimed.");
    describe_counter!("queue_jobs_acked_total", "Jobs whose end this process told to the queue.");
    describe_counter!("queue_leases_lost_total", "Leases that this process lost while it worked.");
    describe_counter!(
        "queue_leases_reaped_total",
        "Expired leases that this process gave back to their queue."
    );
    describe_histogram!(
        "queue_claim_seconds",
        Unit::Seconds,
        "Time that one claim took, the way to Redis included."
    );
    describe_gauge!("dead_letters", "Dead letters that nobody has dealt with.");
    describe_gauge!("parked_sagas", "Sagas that could not be undone and need a person.");
    describe_gauge!("circuit_breaker_state", "0: closed, 1: half-open, 2: open.");
    describe_counter!(
        "circuit_breaker_probes_total",
        "Probes of dependencies by their circuit breakers, by what they found."
    );
    describe_counter!("jobs_accepted_total", "Jobs that this process accepted.");
    describe_counter!("http_requests_total", "HTTP requests that this process answered.");
    describe_histogram!(
        "http_request_duration_seconds",
        Unit::Seconds,
        "Time until an HTTP request was answered."
    );
    describe_histogram!("embed_batch_seconds", Unit::Seconds, "Time that one batch of texts took to embed.");
    describe_counter!("embed_texts_total", "Texts embedded.");
    describe_histogram!("coalescer_batch_size", "Calls that shared one statement or request to a store.");
    describe_gauge!("coalescer_batch_limit", "Calls that may share one, as the store's answers allow now.");
    describe_gauge!("outbox_unrelayed", "Accepted jobs that are not in the queue yet.");
    describe_counter!("batches_finished_total", "Batches whose last member has ended.");
    describe_counter!("reconciler_redispatched_total", "Jobs that had to be put into the queue again.");
    describe_counter!("schedules_ticks_total", "Ticks of schedules, by what became of them.");
    describe_gauge!(
        "schedules_lateness_seconds",
        Unit::Seconds,
        "How late the longest due tick of any schedule is."
    );
    describe_gauge!(
        "audit_drift",
        "Disagreements between the stores that the fleet's last audit left, by kind."
    );
    describe_gauge!("audit_age_seconds", Unit::Seconds, "Time since the fleet's last audit came to its end.");
}
