//! What a benchmark prints: figures, each beside a reference.

use std::time::Duration;

use serde::Serialize;

/// All figures of one benchmark; the same shape as every `flotilla bench`.
#[derive(Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub results: Vec<Figure>,
}

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    /// What the figure is compared with.
    pub reference: String,
    /// That, in the same unit.
    pub reference_value: f64,
    /// The value over the reference's; 0 where there is no reference.
    pub ratio: f64,
    /// Median and 99th percentile of one call or pick-up, in milliseconds; 0 where the figure is no time.
    pub p50: f64,
    pub p99: f64,
}

impl Figure {
    pub fn new(
        name: impl Into<String>,
        unit: &'static str,
        value: f64,
        reference: impl Into<String>,
        reference_value: f64,
    ) -> Self {
        Self {
            name: name.into(),
            value: rounded(value),
            unit,
            reference: reference.into(),
            reference_value: rounded(reference_value),
            ratio: if reference_value > 0.0 {
                (value / reference_value * 1000.0).round() / 1000.0
            } else {
                0.0
            },
            p50: 0.0,
            p99: 0.0,
        }
    }

    pub fn times(mut self, times: Vec<Duration>) -> Self {
        (self.p50, self.p99) = percentiles(times);
        self
    }
}

/// One decimal for what is large, three for what is small.
fn rounded(value: f64) -> f64 {
    if value < 100.0 { (value * 1000.0).round() / 1000.0 } else { (value * 10.0).round() / 10.0 }
}

/// Median and 99th percentile in milliseconds.
pub fn percentiles(mut times: Vec<Duration>) -> (f64, f64) {
    times.sort_unstable();
    (percentile(&times, 0.5), percentile(&times, 0.99))
}

/// The time below which a share of all times lies, in milliseconds; 0 of none. The times are sorted.
pub fn percentile(times: &[Duration], share: f64) -> f64 {
    let index = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len().max(1)) - 1;
    times.get(index).map_or(0.0, |time| (time.as_secs_f64() * 1e6).round() / 1e3)
}

/// The median; of an even number the mean of the middle two; 0 of none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => values[half],
        _ => f64::midpoint(values[half - 1], values[half]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_and_medians_are_of_the_sorted_values() {
        assert_eq!(percentiles((1..=200).rev().map(Duration::from_millis).collect()), (100.0, 198.0));
        assert_eq!((median([3.0, 1.0, 2.0]), median([4.0, 1.0]), median([])), (2.0, 2.5, 0.0));
    }
}
