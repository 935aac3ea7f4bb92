//! Sagas on one document: log, fence, compensation and publication (PROTOCOL.md 2, 6, 8, 9, 10, 12), with everything that a
//! worker may do late.
//!
//! There is no lease here: a job that runs may be taken by another worker at any moment, and whoever held it goes on with what it
//! was about to do, now, later or never. So every pause, crash and zombie at every point is among the states.

use stateright::{Model, Property};

/// Jobs on the document. Their order numbers are 1 and 2.
pub const JOBS: usize = 2;
/// Workers that may hold a job, dead ones among them until a crash frees them.
pub const WORKERS: usize = 3;
/// Runs, each with its version, beside the version that readers see in the beginning.
pub const RUNS: usize = 5;

/// What a job is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A new version of the document.
    Ingest,
    /// No document.
    Delete,
}

/// A deliberate mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mistake {
    /// This write has no fence.
    Unfenced(Write),
    /// The first compensating call comes before the decision to compensate is committed.
    UndoBeforeLog,
    /// Publish looks at no order number.
    PublishWithoutOrder,
    /// A retry goes on under the version of the run that was undone.
    SameVersionAgain,
}

/// The writes to Postgres, each a transaction under the fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Write {
    /// The run's row, and its staged version.
    Stage,
    /// The pivot of an ingest, which ends the job.
    Publish,
    /// The decision to compensate, and how the job will end.
    TurnBack,
    /// The staged version is withdrawn.
    Abandon,
    /// The undone run's end, and the job's.
    Finish,
    /// The pivot of a deletion.
    Bury,
    /// The deletion's end.
    Complete,
}

impl Write {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Stage, Self::Publish, Self::TurnBack, Self::Abandon, Self::Finish, Self::Bury, Self::Complete];
}

/// What a worker does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// A write to Postgres.
    Write(Write),
    /// Points into Qdrant, insert-only; nobody checks a fence there.
    Insert,
    /// The body into the cache.
    Cache,
    /// On the way back: the cache's entry.
    Uncache,
    /// On the way back: the points.
    Remove,
    /// A deletion's: points of all that it has buried.
    Purge,
}

/// How a job ends when its run is undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// It waits for another run.
    Retry,
    /// It is dead.
    Dead,
    /// It is superseded.
    Superseded,
}

/// A job's row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum JobState {
    /// Waiting.
    Waiting,
    /// Taken.
    Running,
    /// Its effect stands.
    Succeeded,
    /// A later job had settled the document.
    Superseded,
    /// A dead letter.
    Dead,
}

/// A job in the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Job {
    /// Its state.
    pub state: JobState,
    /// Grows with every take.
    pub fence: u8,
    /// Fact: how often its effect was published.
    pub effects: u8,
    /// Fact: it had ended, and ran or ended again.
    pub again: bool,
}

/// A run's row in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RunState {
    /// No row.
    Absent,
    /// Going forward.
    Running,
    /// Going backward, for good.
    Compensating(Verdict),
    /// Published, or buried.
    Done,
    /// Undone.
    Undone,
}

/// A version's row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// None.
    Absent,
    /// Written, not to be seen.
    Staged,
    /// Published and not replaced.
    Published,
    /// Replaced, buried or withdrawn: the janitor's.
    Gone,
}

/// One run, and what stands of it in the stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    /// Its job; of the version in the beginning, none.
    pub job: Option<u8>,
    /// The log.
    pub state: RunState,
    /// Postgres.
    pub version: Version,
    /// Qdrant.
    pub points: bool,
    /// The cache.
    pub cached: bool,
}

/// What a worker holds, or believes to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hold {
    /// The job.
    pub job: u8,
    /// The fence of its take.
    pub fence: u8,
    /// The run.
    pub run: u8,
    /// What it does next.
    pub next: Step,
    /// How the job is to end, once it has turned back.
    pub verdict: Verdict,
}

/// Everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct State {
    /// The ledger.
    pub jobs: [Job; JOBS],
    /// The log and the stores. The first is the version in the beginning.
    pub runs: [Run; RUNS],
    /// Runs that were begun by somebody.
    pub begun: u8,
    /// What readers see: a run's version.
    pub shown: Option<u8>,
    /// The order number that settled the document.
    pub order: u8,
    /// The workers.
    pub workers: [Option<Hold>; WORKERS],
    /// Failures so far.
    pub failures: u8,
    /// Crashes so far.
    pub crashes: u8,
    /// Fact: a write under a fence that is not the newest had an effect.
    pub stale: bool,
    /// Fact: an older order number was shown after a newer one.
    pub back: bool,
}

/// The model, and how much may go wrong.
#[derive(Debug, Clone, Copy)]
pub struct Sagas {
    /// The jobs, by order number.
    pub kinds: [Kind; JOBS],
    /// Takes of each job.
    pub takes: u8,
    /// Failures of a step that turn a run back.
    pub failures: u8,
    /// Processes that die.
    pub crashes: u8,
    /// A deliberate mistake.
    pub mistake: Option<Mistake>,
}

/// What may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// A worker takes a job that waits, or that runs and whose lease somebody lost.
    Take(u8, u8),
    /// A worker does what is next.
    Do(u8),
    /// What is next fails for a worker before it had any effect, and the job is to end so.
    Fail(u8, Verdict),
    /// What is next has its effect, and the worker dies before it knows.
    Crash(u8),
    /// The janitor removes what stands of versions that are gone.
    Sweep,
}

impl State {
    fn start() -> Self {
        let job = Job { state: JobState::Waiting, fence: 0, effects: 0, again: false };
        let absent = Run {
            job: None,
            state: RunState::Absent,
            version: Version::Absent,
            points: false,
            cached: false,
        };
        let first =
            Run { state: RunState::Done, version: Version::Published, points: true, cached: true, ..absent };
        let mut runs = [absent; RUNS];
        runs[0] = first;
        Self {
            jobs: [job; JOBS],
            runs,
            begun: 1,
            shown: Some(0),
            order: 0,
            workers: [None; WORKERS],
            failures: 0,
            crashes: 0,
            stale: false,
            back: false,
        }
    }
}

impl Sagas {
    /// Whether a write of this hold may have an effect.
    fn fenced(self, state: &mut State, hold: Hold, write: Write) -> bool {
        let job = state.jobs[usize::from(hold.job)];
        if job.fence == hold.fence && job.state == JobState::Running {
            return true;
        }
        let unfenced = self.mistake == Some(Mistake::Unfenced(write));
        state.stale |= unfenced;
        unfenced
    }

    fn end(state: &mut State, job: u8, how: JobState) {
        let job = &mut state.jobs[usize::from(job)];
        job.again |= !matches!(job.state, JobState::Running | JobState::Waiting);
        job.state = how;
    }

    /// What a worker does after it has lost, ended or given up its job.
    fn let_go(state: &mut State, worker: usize) {
        state.workers[worker] = None;
    }

    fn take(self, state: &mut State, worker: usize, job: u8) -> Option<()> {
        let row = &mut state.jobs[usize::from(job)];
        if row.fence == self.takes || !matches!(row.state, JobState::Waiting | JobState::Running) {
            return None;
        }
        row.state = JobState::Running;
        row.fence += 1;
        let fence = row.fence;
        let open = (0..RUNS).find(|run| {
            state.runs[*run].job == Some(job)
                && matches!(state.runs[*run].state, RunState::Running | RunState::Compensating(_))
        });
        let buried = (0..RUNS)
            .find(|run| state.runs[*run].job == Some(job) && state.runs[*run].state == RunState::Done);
        let mut hold = Hold { job, fence, run: 0, next: Step::Insert, verdict: Verdict::Retry };
        match (open, buried, self.kinds[usize::from(job)]) {
            // On from the log.
            (Some(run), ..) => {
                hold.run = run as u8;
                if let RunState::Compensating(verdict) = state.runs[run].state {
                    (hold.next, hold.verdict) = (Step::Uncache, verdict);
                }
            }
            (None, Some(run), Kind::Delete) => (hold.run, hold.next) = (run as u8, Step::Purge),
            (None, _, kind) => {
                if usize::from(state.begun) == RUNS {
                    return None;
                }
                hold.run = state.begun;
                state.begun += 1;
                hold.next = Step::Write(if kind == Kind::Ingest { Write::Stage } else { Write::Bury });
            }
        }
        state.workers[worker] = Some(hold);
        Some(())
    }

    /// Does what is next for a worker.
    fn advance(self, state: &mut State, worker: usize) -> Option<()> {
        let hold = state.workers[worker]?;
        let run = usize::from(hold.run);
        let order = hold.job + 1;
        let on = |state: &mut State, next| {
            state.workers[worker] = Some(Hold { next, ..hold });
        };
        let Step::Write(write) = hold.next else {
            match hold.next {
                Step::Insert => {
                    state.runs[run].points = true;
                    on(state, Step::Cache);
                }
                Step::Cache => {
                    state.runs[run].cached = true;
                    on(state, Step::Write(Write::Publish));
                }
                Step::Uncache => {
                    state.runs[run].cached = false;
                    on(state, Step::Remove);
                }
                Step::Remove => {
                    state.runs[run].points = false;
                    let late = self.mistake == Some(Mistake::UndoBeforeLog);
                    let logged = matches!(state.runs[run].state, RunState::Compensating(_));
                    let next = if late && !logged { Write::TurnBack } else { Write::Abandon };
                    on(state, Step::Write(next));
                }
                // What a deletion buries is known when it begins.
                _ => {
                    for other in state.runs.iter_mut().filter(|other| other.version == Version::Gone) {
                        (other.points, other.cached) = (false, false);
                    }
                    on(state, Step::Write(Write::Complete));
                }
            }
            return Some(());
        };
        if !self.fenced(state, hold, write) {
            Self::let_go(state, worker);
            return Some(());
        }
        match write {
            Write::Stage => {
                let row = &mut state.runs[run];
                if row.state == RunState::Absent {
                    *row = Run {
                        job: Some(hold.job),
                        state: RunState::Running,
                        version: Version::Staged,
                        ..*row
                    };
                }
                on(state, Step::Insert);
            }
            Write::Publish if state.order >= order && self.mistake != Some(Mistake::PublishWithoutOrder) => {
                let verdict = Verdict::Superseded;
                state.workers[worker] = Some(Hold { next: Step::Write(Write::TurnBack), verdict, ..hold });
            }
            Write::Publish => {
                if let Some(old) = state.shown.replace(hold.run) {
                    state.runs[usize::from(old)].version = Version::Gone;
                }
                state.back |= state.order > order;
                state.order = order;
                state.runs[run].version = Version::Published;
                state.runs[run].state = RunState::Done;
                state.jobs[usize::from(hold.job)].effects += 1;
                Self::end(state, hold.job, JobState::Succeeded);
                Self::let_go(state, worker);
            }
            Write::TurnBack => {
                if matches!(state.runs[run].state, RunState::Running) {
                    state.runs[run].state = RunState::Compensating(hold.verdict);
                }
                let undone = self.mistake == Some(Mistake::UndoBeforeLog);
                on(state, if undone { Step::Write(Write::Abandon) } else { Step::Uncache });
            }
            Write::Abandon => {
                if state.runs[run].version == Version::Staged {
                    state.runs[run].version = Version::Gone;
                }
                on(state, Step::Write(Write::Finish));
            }
            Write::Finish => {
                if matches!(state.runs[run].state, RunState::Compensating(_)) {
                    state.runs[run].state = RunState::Undone;
                }
                let how = match hold.verdict {
                    Verdict::Retry => JobState::Waiting,
                    Verdict::Dead => JobState::Dead,
                    Verdict::Superseded => JobState::Superseded,
                };
                if how == JobState::Waiting && self.mistake == Some(Mistake::SameVersionAgain) {
                    state.runs[run].state = RunState::Running;
                    state.runs[run].version = Version::Staged;
                }
                Self::end(state, hold.job, how);
                Self::let_go(state, worker);
            }
            Write::Bury => {
                if state.order >= order {
                    let how = JobState::Superseded;
                    Self::end(state, hold.job, how);
                    Self::let_go(state, worker);
                    return Some(());
                }
                if let Some(old) = state.shown.take() {
                    state.runs[usize::from(old)].version = Version::Gone;
                }
                state.order = order;
                state.runs[run] = Run { job: Some(hold.job), state: RunState::Done, ..state.runs[run] };
                state.jobs[usize::from(hold.job)].effects += 1;
                on(state, Step::Purge);
            }
            Write::Complete => {
                Self::end(state, hold.job, JobState::Succeeded);
                Self::let_go(state, worker);
            }
        }
        Some(())
    }

    /// A step before the pivot fails.
    fn fail(self, state: &mut State, worker: usize, verdict: Verdict) -> Option<()> {
        let hold = state.workers[worker]?;
        let before_pivot = matches!(hold.next, Step::Insert | Step::Cache | Step::Write(Write::Publish));
        if !before_pivot || state.failures == self.failures {
            return None;
        }
        state.failures += 1;
        let next = if self.mistake == Some(Mistake::UndoBeforeLog) {
            Step::Uncache
        } else {
            Step::Write(Write::TurnBack)
        };
        state.workers[worker] = Some(Hold { next, verdict, ..hold });
        Some(())
    }
}

impl Model for Sagas {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::start()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        // Workers differ in nothing but what they hold, so the first free one stands for all of them.
        if let Some(free) = (0..WORKERS).find(|worker| state.workers[*worker].is_none()) {
            actions.extend((0..JOBS as u8).map(|job| Action::Take(free as u8, job)));
        }
        for worker in (0..WORKERS).filter(|worker| state.workers[*worker].is_some()) {
            let worker = worker as u8;
            actions.extend([
                Action::Do(worker),
                Action::Fail(worker, Verdict::Retry),
                Action::Fail(worker, Verdict::Dead),
                Action::Crash(worker),
            ]);
        }
        actions.push(Action::Sweep);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = *state;
        match action {
            Action::Take(worker, job) => self.take(&mut next, usize::from(worker), job)?,
            Action::Do(worker) => self.advance(&mut next, usize::from(worker))?,
            Action::Fail(worker, verdict) => self.fail(&mut next, usize::from(worker), verdict)?,
            Action::Crash(worker) => {
                if next.crashes == self.crashes {
                    return None;
                }
                self.advance(&mut next, usize::from(worker))?;
                next.crashes += 1;
                next.workers[usize::from(worker)] = None;
            }
            Action::Sweep => {
                for run in next.runs.iter_mut().filter(|run| run.version == Version::Gone) {
                    (run.points, run.cached) = (false, false);
                }
            }
        }
        // Whoever holds what doesn't matter, so the order of the workers doesn't either.
        next.workers.sort_unstable();
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONCE, |_, state: &State| {
                state.jobs.iter().all(|job| match job.state {
                    JobState::Succeeded => job.effects == 1,
                    JobState::Superseded | JobState::Dead => job.effects == 0,
                    _ => job.effects <= 1,
                })
            }),
            Property::always(WHOLE, |_, state: &State| {
                state.shown.is_none_or(|run| {
                    let run = state.runs[usize::from(run)];
                    run.version == Version::Published && run.points
                })
            }),
            Property::always(NEWER, |_, state: &State| !state.back),
            Property::always(STALE, |_, state: &State| !state.stale),
            Property::always(ENDED, |_, state: &State| state.jobs.iter().all(|job| !job.again)),
            Property::always(OWNED, |_, state: &State| {
                state
                    .shown
                    .and_then(|run| state.runs[usize::from(run)].job)
                    .is_none_or(|job| state.jobs[usize::from(job)].state == JobState::Succeeded)
            }),
            // What must be possible, or the rest says nothing.
            Property::sometimes("both jobs succeed", |_, state: &State| {
                state.jobs.iter().all(|job| job.state == JobState::Succeeded)
            }),
            Property::sometimes("a job is published after a run of it was undone", |_, state: &State| {
                (0..JOBS as u8).any(|job| {
                    let has =
                        |wanted| state.runs.iter().any(|run| run.job == Some(job) && run.state == wanted);
                    has(RunState::Undone) && has(RunState::Done)
                })
            }),
            Property::sometimes("a job dies, and readers see what they saw before", |_, state: &State| {
                state.shown == Some(0) && state.jobs.iter().any(|job| job.state == JobState::Dead)
            }),
            Property::sometimes("a job comes too late", |_, state: &State| {
                state.jobs[0].state == JobState::Superseded
            }),
            Property::sometimes("a zombie leaves points of a version that is gone", |_, state: &State| {
                state.runs.iter().any(|run| run.state == RunState::Undone && run.points)
            }),
            Property::sometimes("a worker is about to write under an old fence", |_, state: &State| {
                state.workers.iter().flatten().any(|hold| {
                    matches!(hold.next, Step::Write(_))
                        && hold.fence < state.jobs[usize::from(hold.job)].fence
                })
            }),
        ]
    }
}

/// A job's effect was published once if it has succeeded, and never if it ended otherwise.
pub const ONCE: &str = "an effect stands once or not at all";
/// What readers see is published, with its points.
pub const WHOLE: &str = "readers never see half";
/// By order number.
pub const NEWER: &str = "older content never replaces newer";
/// In Postgres, which alone decides what is seen.
pub const STALE: &str = "a stale write changes nothing";
/// For good.
pub const ENDED: &str = "an ended job stays ended";
/// And of no other.
pub const OWNED: &str = "readers see versions of jobs that have succeeded";
