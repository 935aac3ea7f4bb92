//! Points in time as people give them.

use chrono::{DateTime, TimeDelta, Utc};

/// A point in the past: a time, or how long ago (`90s`, `15m`, `2h`, `3d`).
pub fn past(text: &str) -> Result<DateTime<Utc>, String> {
    let hint = || format!("{text:?}: write 2026-01-31T09:00:00Z, or how long ago: 90s, 15m, 2h, 3d");
    let ago = text.char_indices().next_back().and_then(|(at, unit)| {
        let count: u32 = text[..at].parse().ok()?;
        let seconds = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return None,
        };
        Some(i64::from(count) * seconds)
    });
    match ago {
        Some(seconds) => Utc::now().checked_sub_signed(TimeDelta::seconds(seconds)).ok_or_else(hint),
        None => DateTime::parse_from_rfc3339(text).map(|time| time.with_timezone(&Utc)).map_err(|_| hint()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn past_times_are_absolute_or_so_long_ago() {
        assert_eq!(past("2026-01-31T10:00:00+01:00").unwrap().to_rfc3339(), "2026-01-31T09:00:00+00:00");
        for (text, seconds) in [("90s", 90), ("15m", 900), ("2h", 7200), ("3d", 259_200)] {
            let time = past(text).unwrap();
            let ago = (Utc::now() - time).num_seconds();
            assert!((seconds..=seconds + 60).contains(&ago), "{text}: {ago}");
        }
        for wrong in ["", "h", "2", "2w", "-1h", "yesterday", "ä"] {
            assert!(past(wrong).unwrap_err().contains("15m"), "{wrong}");
        }
        assert!(past("4294967295d").is_err());
    }
}
