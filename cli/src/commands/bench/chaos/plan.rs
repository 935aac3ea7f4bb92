//! Which faults happen, and when: follows from the seed alone.

use std::{fmt, time::Duration};

use super::dice::Dice;

/// Worker processes.
pub const WORKERS: usize = 3;

/// A server that workers, load and reader use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Store {
    Postgres,
    Queue,
    Cache,
    Vectors,
}

impl Store {
    pub const ALL: [Self; 4] = [Self::Postgres, Self::Queue, Self::Cache, Self::Vectors];

    fn name(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Queue => "redis-queue",
            Self::Cache => "redis-cache",
            Self::Vectors => "vectors",
        }
    }
}

/// What has the trouble. One target has one trouble at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// A worker process, by number.
    Worker(usize),
    /// A server.
    Server(Store),
    /// The way between a server and all that use it.
    Link(Store),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Worker(no) => write!(f, "worker {no}"),
            Self::Server(store) => f.write_str(store.name()),
            Self::Link(store) => write!(f, "the link to {}", store.name()),
        }
    }
}

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// SIGKILL, and started again.
    Kill,
    /// SIGSTOP, and SIGCONT.
    Pause,
    /// A graceful stop, and a start.
    Restart,
    /// FLUSHALL.
    Flush,
    /// Connections are closed and refused.
    Cut,
    /// Connections stay and nothing passes.
    Hang,
    /// Each piece takes so much longer.
    Slow(Duration),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "killed",
            Self::Pause => "paused",
            Self::Restart => "restarted",
            Self::Flush => "flushed",
            Self::Cut => "cut",
            Self::Hang => "hung",
            Self::Slow(delay) => return write!(f, "slowed by {delay:?}"),
        })
    }
}

/// One trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// After the begin of the run.
    pub at: Duration,
    pub target: Target,
    pub trouble: Trouble,
    /// Until it is over, or until what was killed is started again.
    pub lasts: Duration,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:7.1} s: {} {} for {:.1} s",
            self.at.as_secs_f64(),
            self.target,
            self.trouble,
            self.lasts.as_secs_f64()
        )
    }
}

/// No fault lasts longer.
const LONGEST: Duration = Duration::from_secs(8);

/// Every 30 s the fleet has so long without a new fault, so that jobs of every kind also get through.
const CALM_MS: u64 = 4000;

/// The faults of a run that lasts so long, in order.
pub fn plan(seed: u64, run: Duration) -> Vec<Fault> {
    let mut dice = Dice::new(seed, 1);
    let end = u64::try_from(run.as_millis()).unwrap_or(u64::MAX);
    let mut busy_until: std::collections::HashMap<Target, u64> = std::collections::HashMap::new();
    let mut faults = vec![];
    let mut at = 1000;
    while at < end {
        if at % 30_000 < CALM_MS && at > CALM_MS {
            at = at - at % 30_000 + CALM_MS;
        }
        let (target, trouble, lasts) = draw(&mut dice);
        let over = at + lasts;
        if over < end && busy_until.get(&target).is_none_or(|busy| *busy < at) {
            // A server needs a while to be back.
            busy_until.insert(target, over + 1500);
            faults.push(Fault {
                at: Duration::from_millis(at),
                target,
                trouble,
                lasts: Duration::from_millis(lasts),
            });
        }
        at += dice.between(400, 2500);
    }
    faults
}

/// The lease is 2 s and a call's time-out 1 s: what lasts longer loses leases and opens breakers, what is shorter does not.
fn draw(dice: &mut Dice) -> (Target, Trouble, u64) {
    let store = dice.one(&Store::ALL);
    match dice.below(100) {
        0..20 => {
            (Target::Worker(dice.below(WORKERS as u64) as usize), Trouble::Kill, dice.between(100, 1500))
        }
        20..35 => (
            Target::Worker(dice.below(WORKERS as u64) as usize),
            Trouble::Pause,
            dice.between(300, LONGEST.as_millis() as u64),
        ),
        35..42 => (Target::Worker(dice.below(WORKERS as u64) as usize), Trouble::Restart, 0),
        42..54 => (Target::Server(store), Trouble::Kill, dice.between(100, 3000)),
        54..64 => (Target::Server(store), Trouble::Pause, dice.between(300, 5000)),
        64..68 => (Target::Server(store), Trouble::Restart, 0),
        68..72 => (Target::Server(dice.one(&[Store::Queue, Store::Cache])), Trouble::Flush, 0),
        72..82 => (Target::Link(store), Trouble::Cut, dice.between(100, 4000)),
        82..90 => (Target::Link(store), Trouble::Hang, dice.between(300, 5000)),
        _ => {
            let delay = Duration::from_millis(dice.between(5, 150));
            (Target::Link(store), Trouble::Slow(delay), dice.between(1000, 6000))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_follows_from_its_seed_and_nothing_else() {
        let minute = Duration::from_secs(60);
        assert_eq!(plan(7, minute), plan(7, minute));
        assert_ne!(plan(7, minute), plan(8, minute));
    }

    #[test]
    fn ten_minutes_hold_every_trouble_of_every_target_and_all_are_over_at_the_end() {
        let run = Duration::from_secs(600);
        let faults = plan(1, run);
        for store in Store::ALL {
            for trouble in [Trouble::Kill, Trouble::Pause] {
                assert!(faults.iter().any(|f| f.target == Target::Server(store) && f.trouble == trouble));
            }
            for trouble in [Trouble::Cut, Trouble::Hang] {
                assert!(faults.iter().any(|f| f.target == Target::Link(store) && f.trouble == trouble));
            }
        }
        for trouble in [Trouble::Kill, Trouble::Pause, Trouble::Restart] {
            assert!(faults.iter().any(|f| matches!(f.target, Target::Worker(_)) && f.trouble == trouble));
        }
        assert!(faults.iter().any(|f| f.trouble == Trouble::Flush));
        assert!(faults.iter().all(|f| f.at + f.lasts < run && f.lasts <= LONGEST));
        assert!(faults.is_sorted_by_key(|f| f.at));
    }

    #[test]
    fn versions_are_swept_for_the_last_time_later_than_faults_can_make_a_writer_late() {
        let bound = super::super::SETTINGS.iter().find(|(name, _)| *name == "FLOTILLA_SWEEP_BOUND_MS");
        let bound = bound.and_then(|(_, ms)| ms.parse().ok()).map(Duration::from_millis);
        assert!(bound.is_some_and(|bound| bound >= LONGEST * 2), "{bound:?}");
    }
}
