//! The rounds of a role that looks at one partition after the other.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{error::QueueError, ids::QueueName, outage::Outage};

/// A partition of a queue.
pub(crate) type Place = (QueueName, u16);

/// Which place a role looks at next, and when: each when it is due, and one of each queue, in turn, at every tick. A place that
/// can't be looked at rests and holds up no other: they may be on other nodes of a cluster.
pub(crate) struct Rounds {
    queues: Vec<QueueName>,
    partitions: u16,
    tick: Duration,
    next_tick: Instant,
    turn: u16,
    /// When a place is to be looked at, by our clock, if that is known.
    due: HashMap<Place, Instant>,
    /// The rest of the present round.
    round: VecDeque<Place>,
    /// Where the last look failed.
    failing: HashSet<Place>,
    outage: Outage,
    /// How long a place that failed is left alone.
    rest: Duration,
}

impl Rounds {
    pub(crate) fn new(
        role: &'static str,
        queues: Vec<QueueName>,
        partitions: u16,
        tick: Duration,
        rest: Duration,
    ) -> Self {
        Self {
            queues,
            partitions,
            tick,
            next_tick: Instant::now(),
            turn: 0,
            due: HashMap::new(),
            round: VecDeque::new(),
            failing: HashSet::new(),
            outage: Outage::new(role),
            rest,
        }
    }

    /// Waits for the next place to look at; `None` on shutdown.
    pub(crate) async fn next(&mut self, shutdown: &CancellationToken) -> Option<Place> {
        loop {
            if shutdown.is_cancelled() {
                return None;
            }
            if let Some(place) = self.round.pop_front() {
                return Some(place);
            }
            let wake = self.due.values().min().copied().map_or(self.next_tick, |due| due.min(self.next_tick));
            tokio::select! {
                () = shutdown.cancelled() => return None,
                () = sleep_until(wake) => self.begin(Instant::now()),
            }
        }
    }

    fn begin(&mut self, now: Instant) {
        self.round.extend(self.due.iter().filter(|(_, due)| **due <= now).map(|(place, _)| place.clone()));
        if self.next_tick <= now {
            let turn = self.queues.iter().map(|name| (name.clone(), self.turn));
            self.round.extend(turn.filter(|place| self.due.get(place).is_none_or(|due| *due > now)));
            self.turn = (self.turn + 1) % self.partitions;
            self.next_tick = now + self.tick;
        }
    }

    /// Takes in what a look brought: how long the place needs no other, if that is known.
    pub(crate) fn looked(&mut self, place: Place, found: Result<Option<Duration>, QueueError>) {
        let wait = match found {
            Ok(wait) => {
                self.failing.remove(&place);
                if self.failing.is_empty() {
                    self.outage.over();
                }
                wait
            }
            Err(error) => {
                self.outage.wait(&error);
                self.failing.insert(place.clone());
                Some(self.rest)
            }
        };
        match wait {
            Some(wait) => self.due.insert(place, Instant::now() + wait),
            None => self.due.remove(&place),
        };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TICK: Duration = Duration::from_millis(1);

    fn rounds(partitions: u16) -> Rounds {
        Rounds::new("test", vec![QueueName::new("ingest").unwrap()], partitions, TICK, TICK)
    }

    #[tokio::test]
    async fn an_outage_ends_when_no_place_fails_any_more() {
        let (mut rounds, shutdown) = (rounds(3), CancellationToken::new());
        let away = || Err(QueueError::Unavailable("refused".to_owned()));
        for (partition, found, lasts) in [
            (0, away(), true),
            (1, Ok(None), true),
            (2, away(), true),
            (0, Ok(None), true),
            (1, Ok(None), true),
            (2, Ok(None), false),
        ] {
            // A place that failed is due when it has rested, which is before its turn.
            let place = loop {
                let place = rounds.next(&shutdown).await.unwrap();
                if place.1 == partition {
                    break place;
                }
                let again = if rounds.failing.contains(&place) { away() } else { Ok(None) };
                rounds.looked(place, again);
            };
            rounds.looked(place, found);
            assert_eq!(rounds.outage.lasts(), lasts, "after {partition}");
        }
    }

    #[tokio::test]
    async fn a_shutdown_ends_a_round_between_two_places() {
        let (mut rounds, shutdown) = (rounds(8), CancellationToken::new());
        for partition in 0..8 {
            let place = (QueueName::new("ingest").unwrap(), partition);
            rounds.looked(place, Ok(Some(Duration::ZERO)));
        }
        assert!(rounds.next(&shutdown).await.is_some());
        assert_eq!(rounds.round.len(), 7);
        shutdown.cancel();
        assert_eq!(rounds.next(&shutdown).await, None);
    }
}
