//! The protocol as a stateright model: what must always hold, and what must be possible.

use stateright::{Model, Property};

use crate::{
    Action, Protocol, State,
    state::{Entry, Phase, Producer, RowState},
};

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::default()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.possible(state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        // An action that changes nothing leads nowhere new.
        self.apply(state, action).map(|(next, _)| next).filter(|next| next != state)
    }

    fn within_boundary(&self, state: &State) -> bool {
        // Only bugs get here: a counter that grows without end.
        state.jobs.iter().all(|job| job.redis_fence < 8 && job.takes < 16)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("an end is committed once", |_, state: &State| {
                state.jobs.iter().all(|job| !job.ended_twice)
            }),
            Property::always("no stale write has an effect", |_, state: &State| {
                state.jobs.iter().all(|job| !job.stale_effect)
            }),
            Property::always("one run at most can have an effect", |_, state: &State| {
                (0..state.jobs.len()).all(|job| live_runs(state, job) <= 1)
            }),
            Property::always("an ended job is never run again", |_, state: &State| {
                state.jobs.iter().all(|job| {
                    job.ended_at.is_none_or(|takes| takes == job.takes && job.row.state.has_ended())
                })
            }),
            Property::always("no lease is taken from its holder", |_, state: &State| {
                state.jobs.iter().all(|job| !job.stolen)
            }),
            Property::always("no job leaves Redis before its end is committed", |_, state: &State| {
                state.life > 0
                    || state.run > 0
                    || state.jobs.iter().all(|job| {
                        !job.row.state.is_open()
                            || !job.row.dispatched
                            || job.producer != Producer::Idle
                            || job.entry.is_some()
                    })
            }),
            // What must be possible, or the rest says nothing.
            Property::sometimes("all jobs succeed", |model: &Self, state: &State| {
                state.is_settled(model.bounds.jobs)
                    && state.jobs[..usize::from(model.bounds.jobs)]
                        .iter()
                        .all(|job| job.row.state == RowState::Succeeded)
            }),
        ]
    }
}

/// How many workers hold a fence that the ledger would accept for the next write.
fn live_runs(state: &State, job: usize) -> usize {
    let row = state.jobs[job].row;
    state
        .workers
        .iter()
        .filter_map(|worker| worker.holds[job])
        .filter(|hold| {
            matches!(hold.phase, Phase::Taken | Phase::Staged)
                && row.state == RowState::Running
                && hold.fence == row.fence
        })
        .count()
}

impl State {
    /// Redis has lost a job that the ledger still has to bring to its end.
    pub fn has_really_lost(&self) -> bool {
        self.life > 0
            && self
                .jobs
                .iter()
                .any(|job| job.row.state.is_open() && job.row.dispatched && job.entry.is_none())
    }

    /// Two workers work on one job, and one of them is stale.
    pub fn has_a_zombie(&self) -> bool {
        (0..self.jobs.len()).any(|job| {
            let working = |hold: &crate::Hold| matches!(hold.phase, Phase::Taken | Phase::Staged);
            self.workers.iter().filter(|worker| worker.holds[job].as_ref().is_some_and(working)).count() > 1
        })
    }

    /// Redis would hand out a job that has ended.
    pub fn offers_an_ended_job(&self) -> bool {
        self.jobs.iter().any(|job| job.row.state.has_ended() && job.entry == Some(Entry::Waiting))
    }
}
