//! Random traces of the model, done again on the real queue and the real ledger: after each action both must say the same.
//!
//! A divergence prints the trace up to it. `FLOTILLA_MODEL_SEED=17` runs the trace of that seed alone.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod world;

use std::{collections::BTreeMap, time::Instant};

use devstack::{RedisOptions, testing::TestServices};
use protocol::{Action, Bounds, Outcome, Protocol, State};
use rand::{Rng, SeedableRng, rngs::StdRng};
use world::World;

const TRACES: u64 = 200;
const ACTIONS: usize = 40;
/// More than the exhaustive check affords. No old copies of Redis' data: a restart would take a second each.
const BOUNDS: Bounds = Bounds {
    crashes: 2,
    pauses: 2,
    delays: 4,
    flushes: 2,
    releases: 3,
    cancels: 2,
    lost_pushes: 1,
    ..Bounds::CALM
};

/// A trace of the model: action, answer, and the state after it.
fn trace(seed: u64) -> Vec<(Action, Outcome, State)> {
    let model = Protocol { joint_heartbeat: true, ..Protocol::new(BOUNDS) };
    let mut random = StdRng::seed_from_u64(seed);
    let (mut state, mut trace) = (State::default(), Vec::new());
    while trace.len() < ACTIONS {
        let mut actions = Vec::new();
        model.possible(&state, &mut actions);
        if actions.is_empty() {
            break;
        }
        let action = actions[random.random_range(0..actions.len())];
        let (next, outcome) = model.apply(&state, action).unwrap();
        if random.random_bool(seldom(action, next == state)) {
            continue;
        }
        trace.push((action, outcome, next));
        state = next;
    }
    trace
}

/// How often an action that could happen is passed over, so that jobs get far before trouble comes.
fn seldom(action: Action, changes_nothing: bool) -> f64 {
    match action {
        Action::Cancel { .. } | Action::LosePush { .. } => 0.97,
        Action::FlushAll | Action::Crash { .. } | Action::Pause { .. } => 0.9,
        Action::TickRedis | Action::Return { .. } | Action::Read { .. } => 0.7,
        // Time for a successor to take the job first.
        Action::Write { .. } => 0.6,
        _ if changes_nothing => 0.8,
        _ => 0.0,
    }
}

#[tokio::test]
async fn random_traces_of_the_model_go_the_same_way_on_the_real_queue_and_ledger() {
    let services =
        TestServices::builder().postgres().redis_queue_with(RedisOptions::queue()).start().await.unwrap();
    let ledger = world::ledger(&services).await;
    let seeds = match std::env::var("FLOTILLA_MODEL_SEED") {
        Ok(seed) => seed.parse().map(|seed| seed..seed + 1).expect("FLOTILLA_MODEL_SEED is a whole number"),
        Err(_) => 0..TRACES,
    };
    let (begun, all) = (Instant::now(), seeds.clone().count() as u64 == TRACES);
    let mut answers: BTreeMap<(String, Outcome), u32> = BTreeMap::new();
    for seed in seeds {
        let mut world = World::new(&services, ledger.clone(), seed).await;
        let trace = trace(seed);
        for (step, (action, expected, state)) in trace.iter().enumerate() {
            let found = world.act(*action).await;
            let mut differences = world.differences(state).await;
            if found != *expected {
                differences.push(format!("the model answers {expected:?}, the real one {found:?}"));
            }
            if !differences.is_empty() {
                let way: Vec<String> = trace[..=step]
                    .iter()
                    .map(|(action, outcome, _)| format!("    {action:?} -> {outcome:?}"))
                    .collect();
                panic!(
                    "seed {seed}: model and reality part:\n{}\n  {}",
                    way.join("\n"),
                    differences.join("\n  ")
                );
            }
            *answers.entry((action.name(), *expected)).or_default() += 1;
        }
        world.tidy().await;
    }
    let done: u32 = answers.values().sum();
    println!("{done} actions replayed in {:.1} s", begun.elapsed().as_secs_f64());
    for ((action, outcome), count) in &answers {
        println!("  {action} {outcome:?}: {count}");
    }
    if all {
        let refused = answers.keys().any(|(_, outcome)| *outcome == Outcome::Refused);
        assert!(refused, "no trace has a write that the fence refuses");
        for (action, outcome) in [
            ("Finish", Outcome::Succeeded),
            ("Finish", Outcome::Cancelled),
            ("Take", Outcome::Gone),
            ("Take", Outcome::NotYet),
            ("Ack", Outcome::NotOurs),
            ("Release", Outcome::NotOurs),
            ("Heartbeat", Outcome::Lost),
            ("Heartbeat", Outcome::Restored),
            ("Heartbeat", Outcome::TakenOver),
            ("Reconcile", Outcome::Queued),
            ("Reconcile", Outcome::Present),
        ] {
            assert!(answers.contains_key(&(action.to_owned(), outcome)), "no trace has {action} {outcome:?}");
        }
    }
}
