//! How many items a coalescer puts into one batch: as many as the store answers in good time.

use std::time::Duration;

/// Bounds of a batch, and what it aims at.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Never fewer items than this are allowed.
    pub least: usize,
    /// Allowed at first.
    pub first: usize,
    /// Never more.
    pub most: usize,
    /// A flush that takes longer is too slow, unless fewer items would take as long.
    pub target: Duration,
}

impl Default for Sizes {
    /// 8, 128 and 512 items, 100 ms: an item waits for one flush and then goes with the next, and the two make a call that
    /// a person doesn't notice.
    fn default() -> Self {
        Self { least: 8, first: 128, most: 512, target: Duration::from_millis(100) }
    }
}

/// Added after a full batch that was quick.
const STEP: usize = 8;
/// What of the past counts after one more flush.
const KEEP: f64 = 0.9;

/// Additive increase, multiplicative decrease: a full batch within the target lets the next have a few items more, a slow one
/// halves it. But a commit on a slow disk takes as long for one item as for a hundred, and halving would only make more of
/// them. So a line is kept through what was seen, `time = fixed + per_item * items`, by least squares that forget; a batch is
/// halved only if its items, and not the fixed part, are at least half of its time.
#[derive(Debug)]
pub struct BatchSize {
    sizes: Sizes,
    limit: usize,
    seen: Line,
}

impl BatchSize {
    /// Begins with `sizes.first`.
    pub fn new(sizes: Sizes) -> Self {
        let least = sizes.least.max(1);
        let most = sizes.most.max(least);
        Self {
            sizes: Sizes { least, most, ..sizes },
            limit: sizes.first.clamp(least, most),
            seen: Line::default(),
        }
    }

    /// Items allowed in the next batch.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Takes in how long a flush of `items` took.
    pub fn took(&mut self, items: usize, time: Duration) {
        let seconds = time.as_secs_f64();
        self.seen.add(items as f64, seconds);
        let per_item = self.seen.slope().unwrap_or(seconds / items.max(1) as f64);
        let by_items = per_item * items as f64 >= seconds / 2.0;
        if time > self.sizes.target && by_items {
            // Of two batches in flight the second was made under the old limit: what it says is known already.
            if items * 2 > self.limit {
                self.limit = (self.limit.min(items) / 2).max(self.sizes.least);
            }
        } else if items >= self.limit {
            self.limit = (self.limit + STEP).min(self.sizes.most);
        }
    }

    /// Takes in that a flush of `items` was given up after this time. It would have taken longer, nobody knows how much: only
    /// one that was too slow by then says something.
    pub fn gave_up(&mut self, items: usize, after: Duration) {
        if after > self.sizes.target {
            self.took(items, after);
        }
    }
}

/// Sums of a weighted least-squares line.
#[derive(Debug, Default)]
struct Line {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Line {
    fn add(&mut self, x: f64, y: f64) {
        for sum in [&mut self.weight, &mut self.x, &mut self.y, &mut self.xx, &mut self.xy] {
            *sum *= KEEP;
        }
        self.weight += 1.0;
        self.x += x;
        self.y += y;
        self.xx += x * x;
        self.xy += x * y;
    }

    /// Time per item; `None` while the sizes seen differ too little to tell.
    fn slope(&self) -> Option<f64> {
        let spread = self.weight * self.xx - self.x * self.x;
        (spread > 0.01 * self.x * self.x)
            .then(|| ((self.weight * self.xy - self.x * self.y) / spread).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(flushes: usize, mut time: impl FnMut(usize) -> Duration) -> usize {
        let mut size = BatchSize::new(Sizes::default());
        for _ in 0..flushes {
            let items = size.limit();
            size.took(items, time(items));
            assert!((8..=512).contains(&size.limit()), "{size:?}");
        }
        size.limit()
    }

    #[test]
    fn a_quick_store_gets_larger_batches_up_to_the_bound_and_a_slow_one_smaller() {
        let per_item = |time| move |items| Duration::from_micros(time) * items as u32;
        assert_eq!(after(100, per_item(10)), 512);
        // 2 ms an item: 50 items are the target.
        let settled = after(100, per_item(2000));
        assert!((25..=58).contains(&settled), "{settled}");
        // Even the least takes too long.
        assert_eq!(after(100, per_item(50_000)), 8);
    }

    #[test]
    fn a_store_that_is_slow_whatever_the_size_is_not_asked_more_often() {
        // 150 ms for the commit alone, half a millisecond an item: a smaller batch would be as slow.
        let settled = after(200, |items| Duration::from_micros(150_000 + 500 * items as u64));
        assert!(settled > 100, "{settled}");
    }

    #[test]
    fn it_follows_a_store_that_changes() {
        let mut size = BatchSize::new(Sizes::default());
        for (per_item, most) in [(Duration::from_micros(100), 512), (Duration::from_millis(4), 40)] {
            for _ in 0..100 {
                let items = size.limit();
                size.took(items, per_item * items as u32);
            }
            assert!(size.limit() <= most, "{size:?}");
        }
        for _ in 0..100 {
            let items = size.limit();
            size.took(items, Duration::from_micros(100) * items as u32);
        }
        assert_eq!(size.limit(), 512);
    }

    #[test]
    fn a_flush_that_was_given_up_early_says_nothing_and_a_late_one_that_it_was_too_slow() {
        let mut size = BatchSize::new(Sizes::default());
        size.gave_up(128, Duration::from_millis(1));
        assert_eq!(size.limit(), 128);
        size.gave_up(128, Duration::from_secs(1));
        assert_eq!(size.limit(), 64);
    }

    #[test]
    fn batches_that_are_not_full_change_nothing_while_they_are_quick() {
        let mut size = BatchSize::new(Sizes::default());
        for _ in 0..50 {
            size.took(3, Duration::from_millis(1));
        }
        assert_eq!(size.limit(), 128);
        // Nor does a small one that was slow: its size was not the limit's doing.
        size.took(3, Duration::from_secs(1));
        assert_eq!(size.limit(), 128);
    }
}
