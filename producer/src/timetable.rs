//! When a schedule's ticks are: a cron expression in a time zone.
//!
//! What the clocks' changes do (decision 0025). Where the clocks go forward, an hour's times don't exist: an expression
//! with one fixed time of day that falls there ticks at the first instant after it, one with a range, a list, `*` or `*/n`
//! leaves those times out. Where they go back, an hour's times exist twice: the former ticks the first time only, the
//! latter both times. No tick is ever lost or doubled otherwise.

use std::collections::VecDeque;

use chrono::{DateTime, Utc};
use chrono_tz::Tz;
use croner::{
    Cron,
    errors::CronError,
    parser::{CronParser, Seconds, Year},
};

/// Longest cron expression, in characters.
const MAX_CRON: usize = 256;

/// Why a timetable can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TimetableError {
    /// The expression.
    #[error(
        "cron is {cron:?}: {reason}; five fields are needed (minute hour day month weekday), a sixth in front for seconds, or \
         a word like @daily"
    )]
    Cron {
        /// What was given.
        cron: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The zone.
    #[error("time_zone is {0:?}: a name of the IANA time zone database is needed, like Europe/Berlin or UTC")]
    Zone(String),
}

/// A cron expression in a time zone. Cheap to read again: nothing is kept between uses.
#[derive(Debug, Clone)]
pub struct Timetable {
    cron: Cron,
    zone: Tz,
}

impl Timetable {
    /// Reads both; the error names the field. Five fields, or six with seconds in front.
    pub fn read(cron: &str, time_zone: &str) -> Result<Self, TimetableError> {
        let zone: Tz = time_zone.parse().map_err(|_| TimetableError::Zone(time_zone.to_owned()))?;
        let bad = |reason: String| TimetableError::Cron { cron: cron.to_owned(), reason };
        if cron.chars().count() > MAX_CRON {
            return Err(bad(format!("longer than {MAX_CRON} characters")));
        }
        let parser = CronParser::builder().seconds(Seconds::Optional).year(Year::Disallowed).build();
        let parsed = parser.parse(cron).map_err(|error| bad(error.to_string()))?;
        let table = Self { cron: parsed, zone };
        // `0 0 30 2 *` can be read, but names no time that ever comes.
        match table.cron.find_next_occurrence(&Utc::now().with_timezone(&zone), false) {
            Err(CronError::TimeSearchLimitExceeded) => {
                Err(bad("it names no time that ever comes".to_owned()))
            }
            _ => Ok(table),
        }
    }

    /// The first tick after a time. `None`: there is none.
    pub fn next_after(&self, at: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let next = self.cron.find_next_occurrence(&at.with_timezone(&self.zone), false).ok()?;
        // Whatever the search does: a schedule never goes back or stays.
        Some(next.with_timezone(&Utc)).filter(|next| *next > at)
    }

    /// The last tick before a time.
    fn last_before(&self, at: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let last = self.cron.find_previous_occurrence(&at.with_timezone(&self.zone), false).ok()?;
        Some(last.with_timezone(&Utc)).filter(|last| *last < at)
    }

    /// The ticks after a time, one after another without end.
    pub fn ticks_after(&self, at: DateTime<Utc>) -> impl Iterator<Item = DateTime<Utc>> + '_ {
        std::iter::successors(self.next_after(at), |tick| self.next_after(*tick))
    }

    /// The newest ticks from `first` to `last`, both included, at most `limit`, the oldest first; and whether there are
    /// more between `first` and those. Costs nothing for those it leaves out: it looks from the end.
    pub fn newest(
        &self,
        first: DateTime<Utc>,
        last: DateTime<Utc>,
        limit: usize,
    ) -> (Vec<DateTime<Utc>>, bool) {
        let mut ticks = VecDeque::new();
        let mut before = last + chrono::Duration::seconds(1);
        while let Some(tick) = self.last_before(before).filter(|tick| *tick >= first) {
            if ticks.len() == limit {
                return (ticks.into(), true);
            }
            if tick <= last {
                ticks.push_front(tick);
            }
            before = tick;
        }
        (ticks.into(), false)
    }

    /// The zone, for showing local times.
    pub fn zone(&self) -> Tz {
        self.zone
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        DateTime::parse_from_rfc3339(text).unwrap().with_timezone(&Utc)
    }

    fn local(cron: &str, zone: &str, from: &str, count: usize) -> Vec<String> {
        let table = Timetable::read(cron, zone).unwrap();
        table
            .ticks_after(at(from))
            .take(count)
            .map(|tick| tick.with_timezone(&table.zone()).format("%d %H:%M %Z").to_string())
            .collect()
    }

    #[test]
    fn what_can_not_be_read_is_named_with_the_field() {
        for (cron, zone, says) in [
            ("61 * * * *", "UTC", "cron is \"61 * * * *\": "),
            ("* * *", "UTC", "cron is \"* * *\": "),
            ("", "UTC", "cron is \"\": "),
            ("0 0 30 2 *", "UTC", "no time that ever comes"),
            ("0 0 0 1 1 * 2030", "UTC", "cron is "),
            ("0 9 * * *", "Mars/Olympus", "time_zone is \"Mars/Olympus\": "),
            ("0 9 * * *", "", "time_zone is \"\": "),
        ] {
            let error = Timetable::read(cron, zone).unwrap_err().to_string();
            assert!(error.contains(says), "{cron:?} {zone:?}: {error}");
        }
    }

    #[test]
    fn times_are_those_of_the_zone_summer_and_winter() {
        let table = Timetable::read("0 9 * * *", "Europe/Berlin").unwrap();
        assert_eq!(table.next_after(at("2026-01-10T00:00:00Z")).unwrap(), at("2026-01-10T08:00:00Z"));
        assert_eq!(table.next_after(at("2026-07-10T00:00:00Z")).unwrap(), at("2026-07-10T07:00:00Z"));
        assert_eq!(table.next_after(at("2026-07-10T07:00:00Z")).unwrap(), at("2026-07-11T07:00:00Z"));
    }

    /// Europe/Berlin: 29 March 2026, 02:00 CET becomes 03:00 CEST.
    #[test]
    fn a_local_time_that_does_not_exist_ticks_right_after_the_gap_if_it_is_a_fixed_one() {
        let day = "2026-03-28T03:00:00Z";
        assert_eq!(
            local("30 2 * * *", "Europe/Berlin", day, 3),
            ["29 03:00 CEST", "30 02:30 CEST", "31 02:30 CEST"]
        );
        let night = "2026-03-29T00:30:00Z";
        assert_eq!(local("*/30 * * * *", "Europe/Berlin", night, 2), ["29 03:00 CEST", "29 03:30 CEST"]);
        // The hour before the gap and the one after it tick as always.
        assert_eq!(local("0 1 * * *", "Europe/Berlin", day, 2), ["29 01:00 CET", "30 01:00 CEST"]);
        assert_eq!(local("0 3 * * *", "Europe/Berlin", day, 2), ["29 03:00 CEST", "30 03:00 CEST"]);
    }

    /// Europe/Berlin: 25 October 2026, 03:00 CEST becomes 02:00 CET.
    #[test]
    fn a_local_time_that_exists_twice_ticks_once_if_it_is_a_fixed_one() {
        let night = "2026-10-24T22:00:00Z";
        assert_eq!(local("30 2 * * *", "Europe/Berlin", night, 2), ["25 02:30 CEST", "26 02:30 CET"]);
        assert_eq!(
            local("30 * * * *", "Europe/Berlin", night, 5),
            ["25 00:30 CEST", "25 01:30 CEST", "25 02:30 CEST", "25 02:30 CET", "25 03:30 CET"]
        );
    }

    #[test]
    fn the_newest_ticks_are_those_that_a_walk_from_the_start_ends_with() {
        for zone in ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"] {
            for cron in
                ["*/7 * * * *", "30 2 * * *", "15 1,2,3 * * *", "0 */6 * * 1", "@hourly", "0 0 29 2 *"]
            {
                let table = Timetable::read(cron, zone).unwrap();
                for year in 2024..=2026 {
                    for (month, day) in [(3, 8), (3, 29), (4, 4), (10, 3), (10, 25), (11, 1)] {
                        let begin = at(&format!("{year}-{month:02}-{day:02}T00:00:00Z"));
                        let end = begin + chrono::Duration::hours(60);
                        let walk: Vec<_> = table
                            .ticks_after(begin - chrono::Duration::seconds(1))
                            .take_while(|tick| *tick <= end)
                            .collect();
                        let (all, more) = table.newest(begin, end, usize::MAX);
                        assert_eq!((all, more), (walk.clone(), false), "{cron} {zone} from {begin}");
                        let (some, more) = table.newest(begin, end, 3);
                        assert_eq!(some, walk[walk.len().saturating_sub(3)..]);
                        assert_eq!(more, walk.len() > 3);
                    }
                }
            }
        }
    }

    #[test]
    fn ten_years_of_missed_seconds_cost_no_more_than_ten() {
        let table = Timetable::read("* * * * * *", "UTC").unwrap();
        let begun = std::time::Instant::now();
        let (ticks, more) = table.newest(at("2016-01-01T00:00:00Z"), at("2026-01-01T00:00:00.5Z"), 10);
        assert_eq!((ticks.len(), more), (10, true));
        assert_eq!(*ticks.last().unwrap(), at("2026-01-01T00:00:00Z"));
        assert!(begun.elapsed() < std::time::Duration::from_secs(1), "{:?}", begun.elapsed());
    }
}
