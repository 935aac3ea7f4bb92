//! How many jobs of a queue have ended lately, for people. Nothing depends on it: it is lost with Redis' data.
//!
//! Workers count in memory, once per batch of acks, and tell Redis every ten seconds, together with their
//! [`Presence`](crate::Presence). So the counts lag by so much, a worker that is killed takes its last ones along, and a
//! job's way costs nothing.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use serde::Serialize;

use crate::{
    error::QueueError,
    ids::QueueName,
    queue::{Queue, text},
    reply::Reply,
    scripts,
};

/// Counts are kept by slots of this length, for an hour and the slot that is under way.
const SLOT: Duration = Duration::from_secs(10);
const SLOTS: i64 = 361;
const SLOTS_OF_A_MINUTE: i64 = 6;
const SLOTS_OF_AN_HOUR: i64 = 360;
/// And by days of UTC, for a week.
const DAY: Duration = Duration::from_secs(24 * 3600);
const DAYS: i64 = 7;

/// How many jobs ended within a time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ended {
    /// All that have ended: succeeded, cancelled or dead.
    pub ended: u64,
    /// Those that a person must look at: dead or parked.
    pub dead: u64,
    /// Within so many seconds until now.
    pub seconds: f64,
}

impl Ended {
    /// Jobs that ended per second.
    pub fn per_second(&self) -> f64 {
        self.ended as f64 / self.seconds
    }

    /// Jobs that became dead per second.
    pub fn dead_per_second(&self) -> f64 {
        self.dead as f64 / self.seconds
    }

    /// The share of those that ended and are not dead, 0 to 1; `None` if none ended.
    pub fn fine(&self) -> Option<f64> {
        (self.ended > 0).then(|| 1.0 - self.dead as f64 / self.ended as f64)
    }
}

/// How fast a queue is worked off.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rates {
    /// Within the last 50 to 60 seconds.
    pub minute: Ended,
    /// Within the last hour.
    pub hour: Ended,
    /// How many ended on each of the last seven days of UTC, today last.
    pub days: [u64; DAYS as usize],
}

impl Rates {
    /// Of no queue; [`add`](Self::add) brings some together.
    pub(crate) fn none() -> Self {
        let of = |seconds| Ended { ended: 0, dead: 0, seconds };
        Self { minute: of(60.0), hour: of(3600.0), days: [0; DAYS as usize] }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (sum, one) in [(&mut self.minute, other.minute), (&mut self.hour, other.hour)] {
            *sum = Ended { ended: sum.ended + one.ended, dead: sum.dead + one.dead, seconds: one.seconds };
        }
        for (sum, one) in self.days.iter_mut().zip(other.days) {
            *sum += one;
        }
    }
}

/// Ended jobs that Redis was not told of, and how many of them are dead, by queue.
#[derive(Debug, Default)]
pub(crate) struct Tally(Mutex<HashMap<QueueName, (u64, u64)>>);

impl Tally {
    pub fn add(&self, counts: HashMap<QueueName, (u64, u64)>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (queue, (ended, dead)) in counts {
            let sum = all.entry(queue).or_default();
            *sum = (sum.0 + ended, sum.1 + dead);
        }
    }

    fn take(&self) -> HashMap<QueueName, (u64, u64)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Queue {
    fn counts_key(&self, queue: &QueueName) -> String {
        format!("{}:n:{queue}", self.registry_key())
    }

    /// Tells Redis how many jobs have ended here since the last time.
    pub(crate) async fn tell_ended(&self) -> Result<(), QueueError> {
        let counts = self.shared.tally.take();
        if counts.is_empty() {
            return Ok(());
        }
        let mut args = vec![self.now(), text(SLOT.as_millis()), text(SLOTS), text(DAYS)];
        for (queue, (ended, dead)) in &counts {
            args.extend([text(queue), text(ended), text(dead)]);
        }
        let told = self.shared.link.script(&scripts::TALLY, &self.registry_key(), &args).await;
        if told.is_err() {
            self.shared.tally.add(counts);
        }
        told.map(drop)
    }

    /// How many jobs of a queue have ended lately, over all workers. Up to ten seconds behind.
    pub async fn rates(&self, queue: &QueueName) -> Result<Rates, QueueError> {
        let mut get = redis::cmd("HMGET");
        get.arg(self.counts_key(queue));
        for slot in 0..SLOTS {
            get.arg(format!("s{slot}"));
        }
        for day in 0..DAYS {
            get.arg(format!("d{day}"));
        }
        let now = self.redis_now().await?;
        let mut reply = Reply::new(self.shared.link.command(&get).await?.value)?;
        let mut times = Vec::with_capacity((SLOTS + DAYS) as usize);
        while !reply.is_empty() {
            times.push(reply.optional()?.map(|text| count(&text)).transpose()?);
        }
        let (slots, days) = times.split_at((SLOTS as usize).min(times.len()));
        let (slot, day) = (now / SLOT.as_millis() as i64, now / DAY.as_millis() as i64);
        let begun = (now % SLOT.as_millis() as i64) as f64 / 1000.0;
        let within = |slots_back: i64| {
            let whole = (slots_back - 1) * SLOT.as_secs() as i64;
            let mut sum = Ended { ended: 0, dead: 0, seconds: whole as f64 + begun };
            for (_, ended, dead) in slots.iter().flatten().filter(|(time, ..)| slot - time < slots_back) {
                (sum.ended, sum.dead) = (sum.ended + ended, sum.dead + dead);
            }
            sum
        };
        let mut rates =
            Rates { minute: within(SLOTS_OF_A_MINUTE), hour: within(SLOTS_OF_AN_HOUR), ..Rates::none() };
        for (time, ended, _) in days.iter().flatten() {
            if let Some(at) =
                usize::try_from(time - day + DAYS - 1).ok().and_then(|at| rates.days.get_mut(at))
            {
                *at = *ended;
            }
        }
        Ok(rates)
    }
}

/// The number of a slot's time, how many ended, how many of these are dead.
fn count(text: &str) -> Result<(i64, u64, u64), QueueError> {
    let mut numbers = text.split(' ');
    let mut next = || numbers.next();
    (|| Some((next()?.parse().ok()?, next()?.parse().ok()?, next()?.parse().ok()?)))()
        .ok_or_else(|| QueueError::Protocol(format!("expected a count of ended jobs, got {text:?}")))
}
