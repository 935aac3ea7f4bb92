//! What can happen, and what it does. Each action is named for the function or script that does it.

use crate::{
    Bug, Protocol, State,
    state::{Cancelled, Entry, Hold, Job, Phase, Producer, RowState, Saved},
};

/// One thing that happens, in one place, at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the fields are indices
pub enum Action {
    /// `Postgres::accept`, by a producer that pushes the job itself (`dispatched`) or leaves it to the relay.
    Accept { job: usize, dispatched: bool },
    /// `push.lua`, by the producer.
    Push { job: usize },
    /// The producer dies between the two.
    LosePush { job: usize },
    /// The relay's round: `undispatched`, `push.lua`, `Batch::done`, under the row's lock.
    Relay { job: usize },
    /// `claim.lua`.
    Claim { worker: usize, job: usize },
    /// `TakeBatch`.
    Take { worker: usize, job: usize },
    /// A step's fenced write; the first one begins the saga (`StageBatch`).
    Write { worker: usize, job: usize },
    /// The fenced end: the pivot (`PublishBatch`), or `Postgres::finish` if a cancel was asked for.
    Finish { worker: usize, job: usize },
    /// `Postgres::release`, at once or for later.
    Return { worker: usize, job: usize, later: bool },
    /// `release.lua`, after `Return` or after a take that said *not yet*.
    Release { worker: usize, job: usize },
    /// `ack.lua`.
    Ack { worker: usize, job: usize },
    /// `heartbeat.lua`.
    Heartbeat { worker: usize, job: usize },
    /// `restore.lua`, after a heartbeat that found the lease gone with its data.
    Restore { worker: usize, job: usize },
    /// `reap.lua`.
    Reap { job: usize },
    /// `promote.lua`.
    Promote { job: usize },
    /// `Postgres::cancel`.
    Cancel { job: usize },
    /// `forget.lua` after a cancel, and `push.lua` for a job that its saga must undo.
    Forget { job: usize },
    /// The reconciler reads an unfinished row.
    Read { job: usize },
    /// The reconciler pushes what it read, however long ago.
    Reconcile { job: usize },
    /// `FLUSHALL`, or an empty restart.
    FlushAll,
    /// Redis writes a copy of its data.
    Save,
    /// Redis starts again from that copy.
    Restart,
    /// A worker's process dies and starts again.
    Crash { worker: usize },
    /// A worker stops (SIGSTOP, a long pause of its machine).
    Pause { worker: usize },
    /// It goes on, and knows nothing of what happened.
    Resume { worker: usize },
    /// Redis' clock passes the end of every lease and every due time.
    TickRedis,
    /// Postgres' clock passes every `run_at`. Nothing relates it to Redis' clock.
    TickPostgres,
}

/// What an action was answered. A trace that is replayed must get the same answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    /// Nothing to answer.
    Done,
    /// push: the job is in Redis now.
    Queued,
    /// push: it was there.
    Present,
    /// take: ours.
    Granted,
    /// take: the job has ended.
    Gone,
    /// take: not due.
    NotYet,
    /// A fenced write had its effect.
    Written,
    /// The fence refused it.
    Refused,
    /// finish: the job succeeded.
    Succeeded,
    /// finish: the job is cancelled.
    Cancelled,
    /// ack, release: it was our lease.
    Ours,
    /// ack, release: it wasn't.
    NotOurs,
    /// heartbeat: runs for its full time again.
    Extended,
    /// heartbeat: not ours any more.
    Lost,
    /// heartbeat: gone with the data; `restore` follows.
    Vanished,
    /// restore: registered again, of a job that Redis didn't know.
    Restored,
    /// restore: registered again, of a job that somebody put back.
    TakenOver,
    /// cancel: the job has ended.
    Ended,
    /// cancel: its run ends it.
    Requested,
    /// cancel: too late.
    TooLate,
}

impl Protocol {
    /// Every action that can happen in a state. Some change nothing.
    pub fn possible(&self, state: &State, actions: &mut Vec<Action>) {
        let (bounds, used) = (&self.bounds, &state.used);
        for (job, it) in state.jobs[..usize::from(bounds.jobs)].iter().enumerate() {
            if it.row.state == RowState::Absent {
                actions.extend([true, false].map(|dispatched| Action::Accept { job, dispatched }));
                continue;
            }
            if it.producer == Producer::Push {
                actions.push(Action::Push { job });
                if used.lost_pushes < bounds.lost_pushes {
                    actions.push(Action::LosePush { job });
                }
            }
            // A leased one is left to its worker, which is about to put it back; the relay looks again.
            let leased = matches!(it.entry, Some(Entry::Leased { .. }));
            if it.row.state == RowState::Waiting && !it.row.dispatched && !leased {
                actions.push(Action::Relay { job });
            }
            match it.entry {
                Some(Entry::Leased { expired: true, .. })
                    if (!state.quiet || self.has(Bug::ReapAtOnce)) && !self.has(Bug::NoReaper) =>
                {
                    actions.push(Action::Reap { job });
                }
                Some(Entry::Scheduled { due: true }) => actions.push(Action::Promote { job }),
                _ => {}
            }
            if used.cancels < bounds.cancels && it.row.state.is_open() && !it.row.cancel {
                actions.push(Action::Cancel { job });
            }
            if it.telling.is_some() {
                actions.push(Action::Forget { job });
            }
            if it.row.state.is_open()
                && it.row.dispatched
                && it.read.is_none()
                && !self.has(Bug::NoReconciler)
            {
                if bounds.slow_reconciler {
                    actions.push(Action::Read { job });
                } else if it.entry.is_none() {
                    actions.push(Action::Reconcile { job });
                }
            }
            if it.read.is_some() {
                actions.push(Action::Reconcile { job });
            }
        }
        self.possible_for_workers(state, actions);
        if used.flushes < bounds.flushes {
            actions.push(Action::FlushAll);
        }
        if used.restarts < bounds.restarts {
            actions.push(if state.saved.is_none() { Action::Save } else { Action::Restart });
        }
        if self.redis_may_tick(state) {
            actions.push(Action::TickRedis);
        }
        if state.jobs.iter().any(|job| job.row.state == RowState::Waiting && !job.row.due) {
            actions.push(Action::TickPostgres);
        }
    }

    fn possible_for_workers(&self, state: &State, actions: &mut Vec<Action>) {
        let (bounds, used) = (&self.bounds, &state.used);
        for (worker, it) in state.workers.iter().enumerate() {
            let holds = it.holds.iter().any(Option::is_some);
            if holds && used.crashes < bounds.crashes {
                actions.push(Action::Crash { worker });
            }
            if it.paused {
                actions.push(Action::Resume { worker });
                continue;
            }
            if holds && used.pauses < bounds.pauses {
                actions.push(Action::Pause { worker });
            }
            for (job, hold) in it.holds.iter().enumerate().take(usize::from(bounds.jobs)) {
                let Some(hold) = hold else {
                    if state.jobs[job].entry == Some(Entry::Waiting) {
                        actions.push(Action::Claim { worker, job });
                    }
                    continue;
                };
                if hold.gone {
                    actions.push(Action::Restore { worker, job });
                } else if matches!(hold.phase, Phase::Claimed | Phase::Taken | Phase::Staged) {
                    actions.push(Action::Heartbeat { worker, job });
                }
                let may_return = used.releases < bounds.releases;
                match hold.phase {
                    Phase::Claimed => actions.push(Action::Take { worker, job }),
                    Phase::Taken | Phase::Staged => {
                        if hold.phase == Phase::Taken {
                            actions.push(Action::Write { worker, job });
                        } else {
                            let early = self.has(Bug::AckBeforeCommit);
                            actions.push(if early {
                                Action::Ack { worker, job }
                            } else {
                                Action::Finish { worker, job }
                            });
                        }
                        if may_return {
                            actions.extend([false, true].map(|later| Action::Return { worker, job, later }));
                        }
                    }
                    Phase::Ended => actions.push(Action::Ack { worker, job }),
                    Phase::Returned { .. } => actions.push(Action::Release { worker, job }),
                    Phase::Acked => actions.push(Action::Finish { worker, job }),
                }
            }
        }
    }

    /// Leases of the dead and the paused run out in time; those of living workers only as often as the bounds allow.
    fn redis_may_tick(&self, state: &State) -> bool {
        let moves = state.quiet
            || state.jobs.iter().any(|job| {
                matches!(
                    job.entry,
                    Some(Entry::Leased { expired: false, .. } | Entry::Scheduled { due: false })
                )
            });
        moves && (state.used.delays < self.bounds.delays || !hurts_the_living(state))
    }

    /// Does one action; `None` if it can't happen here.
    pub fn apply(&self, before: &State, action: Action) -> Option<(State, Outcome)> {
        let mut state = *before;
        let outcome = match action {
            Action::Accept { job, dispatched } => {
                let job = &mut state.jobs[job];
                job.row.state = RowState::Waiting;
                job.row.due = true;
                job.row.dispatched = dispatched;
                job.producer = if dispatched { Producer::Push } else { Producer::Idle };
                Outcome::Done
            }
            Action::Push { job } => {
                let job = &mut state.jobs[job];
                job.producer = Producer::Idle;
                push(job, false)
            }
            Action::LosePush { job } => {
                state.used.lost_pushes += 1;
                state.jobs[job].producer = Producer::Died;
                Outcome::Done
            }
            Action::Relay { job } => {
                let job = &mut state.jobs[job];
                job.row.dispatched = true;
                let outcome = push(job, !job.row.due);
                // One whose time has changed is stored anew.
                if matches!(job.entry, Some(Entry::Scheduled { .. })) {
                    job.entry = None;
                    push(job, !job.row.due);
                }
                outcome
            }
            Action::Read { job } => {
                let job = &mut state.jobs[job];
                job.read = Some(!job.row.due);
                Outcome::Done
            }
            Action::Reconcile { job } => {
                let job = &mut state.jobs[job];
                let later = job.read.take().unwrap_or(!job.row.due);
                if job.producer == Producer::Died {
                    job.producer = Producer::Idle;
                }
                push(job, later)
            }
            Action::Reap { job } | Action::Promote { job } => {
                state.jobs[job].entry = Some(Entry::Waiting);
                Outcome::Done
            }
            Action::Cancel { job } => {
                state.used.cancels += 1;
                cancel(&mut state.jobs[job])
            }
            Action::Forget { job } => self.forget(&mut state.jobs[job])?,
            Action::FlushAll => {
                state.used.flushes += 1;
                state.life = state.used.flushes;
                state.quiet = true;
                for job in &mut state.jobs {
                    job.entry = None;
                    job.named = false;
                    job.redis_fence = 0;
                }
                Outcome::Done
            }
            Action::Save => {
                state.saved =
                    Some(Saved { life: state.life, jobs: state.jobs.map(|job| (job.entry, job.named)) });
                Outcome::Done
            }
            Action::Restart => {
                let saved = state.saved.take()?;
                state.used.restarts += 1;
                state.life = saved.life;
                state.run += 1;
                state.quiet = true;
                for (job, (entry, named)) in state.jobs.iter_mut().zip(saved.jobs) {
                    job.entry = entry;
                    job.named = named;
                }
                Outcome::Done
            }
            Action::Crash { worker } => {
                state.used.crashes += 1;
                state.workers[worker] = crate::Worker::default();
                Outcome::Done
            }
            Action::Pause { worker } => {
                state.used.pauses += 1;
                state.workers[worker].paused = true;
                Outcome::Done
            }
            Action::Resume { worker } => {
                state.workers[worker].paused = false;
                Outcome::Done
            }
            Action::TickRedis => {
                state.used.delays += u8::from(hurts_the_living(&state));
                state.quiet = false;
                for job in &mut state.jobs {
                    if let Some(Entry::Leased { expired: passed, .. } | Entry::Scheduled { due: passed }) =
                        &mut job.entry
                    {
                        *passed = true;
                    }
                }
                Outcome::Done
            }
            Action::TickPostgres => {
                for job in state.jobs.iter_mut().filter(|job| job.row.state == RowState::Waiting) {
                    job.row.due = true;
                }
                Outcome::Done
            }
            Action::Claim { worker, job } => {
                let token = state.fresh_token(job);
                let (life, run) = (state.life, state.run);
                let it = &mut state.jobs[job];
                it.entry = Some(Entry::Leased { token, expired: false });
                it.named = true;
                it.redis_fence += u8::from(self.has(Bug::FenceFromRedis));
                state.workers[worker].holds[job] = Some(Hold {
                    token,
                    life,
                    run,
                    fence: 0,
                    take: 0,
                    redis_fence: it.redis_fence,
                    phase: Phase::Claimed,
                    gone: false,
                });
                Outcome::Done
            }
            Action::Take { worker, job }
            | Action::Write { worker, job }
            | Action::Finish { worker, job }
            | Action::Return { worker, job, .. }
            | Action::Release { worker, job }
            | Action::Ack { worker, job }
            | Action::Heartbeat { worker, job }
            | Action::Restore { worker, job } => {
                let mut hold = state.workers[worker].holds[job]?;
                let (outcome, keep) = self.work(&mut state, job, &mut hold, action)?;
                state.workers[worker].holds[job] = keep.then_some(hold);
                outcome
            }
        };
        Some((state, outcome))
    }

    /// What a worker does with a job that it holds; whether it still holds it then.
    fn work(
        &self,
        state: &mut State,
        job: usize,
        hold: &mut Hold,
        action: Action,
    ) -> Option<(Outcome, bool)> {
        let (life, run) = (state.life, state.run);
        let job = &mut state.jobs[job];
        let ours = matches!(job.entry, Some(Entry::Leased { token, .. }) if token == hold.token);
        Some(match action {
            Action::Take { .. } => self.take(job, hold),
            Action::Write { .. } => {
                if job.row.state == RowState::Running && job.row.fence == hold.fence
                    || self.has(Bug::WriteWithoutFence)
                {
                    job.row.saga = true;
                    job.stale_effect |= hold.take != job.takes;
                    hold.phase = Phase::Staged;
                    (Outcome::Written, true)
                } else {
                    (Outcome::Refused, false)
                }
            }
            Action::Finish { .. } => {
                let early = hold.phase == Phase::Acked;
                let held = match self.bug {
                    Some(Bug::FinishWithoutFence) => job.row.state == RowState::Running,
                    Some(Bug::FinishWithoutAnyPredicate) => true,
                    _ => job.row.state == RowState::Running && job.row.fence == hold.fence,
                };
                if !held {
                    return Some((Outcome::Refused, false));
                }
                job.stale_effect |= hold.take != job.takes;
                job.ended_twice |= job.ended_at.is_some();
                job.ended_at.get_or_insert(job.takes);
                job.row.saga = false;
                let outcome = if job.row.cancel {
                    job.row.state = RowState::Cancelled;
                    Outcome::Cancelled
                } else {
                    job.row.state = RowState::Succeeded;
                    Outcome::Succeeded
                };
                hold.phase = Phase::Ended;
                (outcome, !early)
            }
            Action::Return { later, .. } => {
                // Whoever takes it next ends it.
                let later = later && (!job.row.cancel || job.row.saga);
                if job.row.state != RowState::Running || job.row.fence != hold.fence {
                    return Some((Outcome::Refused, false));
                }
                state.used.releases += 1;
                job.stale_effect |= hold.take != job.takes;
                job.row.state = RowState::Waiting;
                job.row.due = !later;
                hold.phase = Phase::Returned { later };
                (Outcome::Written, true)
            }
            Action::Release { .. } => {
                let Phase::Returned { later } = hold.phase else { return None };
                if ours {
                    job.entry = Some(if later { Entry::Scheduled { due: false } } else { Entry::Waiting });
                }
                (if ours { Outcome::Ours } else { Outcome::NotOurs }, false)
            }
            Action::Ack { .. } => {
                let early = hold.phase == Phase::Staged;
                hold.phase = Phase::Acked;
                let any = self.has(Bug::AckWithoutToken) && matches!(job.entry, Some(Entry::Leased { .. }));
                if ours || any {
                    job.stolen |= !ours;
                    job.entry = None;
                }
                (if ours { Outcome::Ours } else { Outcome::NotOurs }, early)
            }
            Action::Heartbeat { .. } => {
                let known = job.named && life == hold.life;
                match &mut job.entry {
                    Some(Entry::Leased { expired, .. }) if ours => {
                        *expired = false;
                        hold.run = run;
                        (Outcome::Extended, true)
                    }
                    // heartbeat.lua: a lease or a schedule entry of somebody else; or absent in the life that the
                    // lease was claimed in, by a server that didn't restart.
                    Some(Entry::Leased { .. } | Entry::Scheduled { .. }) => (Outcome::Lost, false),
                    _ if known && hold.run == run => (Outcome::Lost, false),
                    _ if self.joint_heartbeat => self.restore(job, hold, life, run),
                    _ => {
                        hold.gone = true;
                        (Outcome::Vanished, true)
                    }
                }
            }
            Action::Restore { .. } => self.restore(job, hold, life, run),
            _ => return None,
        })
    }

    fn take(&self, job: &mut Job, hold: &mut Hold) -> (Outcome, bool) {
        if job.row.state.has_ended() && !self.has(Bug::TakeOfEndedJobs) {
            hold.phase = Phase::Ended;
            return (Outcome::Gone, true);
        }
        if job.row.state == RowState::Waiting && !job.row.due {
            hold.phase = Phase::Returned { later: true };
            return (Outcome::NotYet, true);
        }
        job.takes += 1;
        job.row.fence = if self.has(Bug::FenceFromRedis) { hold.redis_fence } else { job.row.fence + 1 };
        job.row.state = RowState::Running;
        job.row.due = true;
        job.row.dispatched = true;
        hold.fence = job.row.fence;
        hold.take = job.takes;
        // A run that began goes on from its log.
        hold.phase = if job.row.saga { Phase::Staged } else { Phase::Taken };
        (Outcome::Granted, true)
    }

    fn restore(&self, job: &mut Job, hold: &mut Hold, life: u8, run: u8) -> (Outcome, bool) {
        hold.gone = false;
        job.named = true;
        let outcome = match job.entry {
            Some(Entry::Waiting) => Outcome::TakenOver,
            None => Outcome::Restored,
            Some(Entry::Leased { expired, .. }) if self.has(Bug::RestoreOverOthers) => {
                job.stolen |= !expired;
                Outcome::TakenOver
            }
            Some(_) => return (Outcome::Lost, false),
        };
        job.entry = Some(Entry::Leased { token: hold.token, expired: false });
        hold.life = life;
        hold.run = run;
        (outcome, true)
    }

    fn forget(&self, job: &mut Job) -> Option<Outcome> {
        let answer = job.telling.take()?;
        let undo = answer == Cancelled::Requested && job.row.state == RowState::Waiting;
        if answer == Cancelled::Ended || undo || self.has(Bug::ForgetOfRunningJobs) {
            if !matches!(job.entry, Some(Entry::Leased { .. })) {
                job.entry = None;
            }
            if undo {
                push(job, !job.row.due);
            }
        }
        Some(Outcome::Done)
    }
}

/// Whether a tick of Redis' clock ends a lease of a worker that lives and isn't paused.
fn hurts_the_living(state: &State) -> bool {
    state.jobs.iter().enumerate().any(|(index, job)| {
        let Some(Entry::Leased { token, expired: false }) = job.entry else { return false };
        state
            .workers
            .iter()
            .any(|worker| !worker.paused && worker.holds[index].is_some_and(|hold| hold.token == token))
    })
}

fn push(job: &mut Job, later: bool) -> Outcome {
    job.named = true;
    if job.entry.is_some() {
        return Outcome::Present;
    }
    job.entry = Some(if later { Entry::Scheduled { due: false } } else { Entry::Waiting });
    Outcome::Queued
}

fn cancel(job: &mut Job) -> Outcome {
    match job.row.state {
        RowState::Waiting if !job.row.saga => {
            job.row.state = RowState::Cancelled;
            job.row.cancel = true;
            job.ended_twice |= job.ended_at.is_some();
            job.ended_at.get_or_insert(job.takes);
            job.telling = Some(Cancelled::Ended);
            Outcome::Ended
        }
        RowState::Waiting | RowState::Running => {
            job.row.cancel = true;
            job.row.due = true;
            job.row.dispatched &= job.row.state == RowState::Running;
            job.telling = Some(Cancelled::Requested);
            Outcome::Requested
        }
        _ => Outcome::TooLate,
    }
}
