//! Which places of a cluster are left alone for a while, because their node didn't answer.

use std::collections::HashMap;

use tokio::time::Instant;

use crate::{error::QueueError, outage::Outage};

/// The outages that the claimer sees, by place. On one server an outage pauses the claimer as a whole; in a cluster
/// the places on other nodes go on.
#[derive(Default)]
pub(crate) struct Rests {
    places: HashMap<usize, (Outage, Instant)>,
}

impl Rests {
    /// Leaves a place alone after a failed call, longer each time.
    pub(crate) fn begin(&mut self, place: usize, error: &QueueError) {
        let (outage, until) =
            self.places.entry(place).or_insert_with(|| (Outage::new("claimer"), Instant::now()));
        *until = Instant::now() + outage.wait(error);
    }

    /// Notes a call that got through.
    pub(crate) fn over(&mut self, place: usize) {
        if let Some((mut outage, _)) = self.places.remove(&place) {
            outage.over();
        }
    }

    pub(crate) fn is_resting(&self, place: usize) -> bool {
        self.places.get(&place).is_some_and(|(_, until)| *until > Instant::now())
    }

    /// When the next rest ends, if there is any.
    pub(crate) fn next_end(&self) -> Option<Instant> {
        let now = Instant::now();
        self.places.values().map(|(_, until)| *until).filter(|until| *until > now).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_place_that_failed_rests() {
        let mut rests = Rests::default();
        rests.begin(3, &QueueError::Unavailable("away".to_owned()));
        assert!(rests.is_resting(3) && !rests.is_resting(2));
        assert!(rests.next_end().is_some());
        rests.over(3);
        assert!(!rests.is_resting(3) && rests.next_end().is_none());
    }
}
