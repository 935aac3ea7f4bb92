//! What is printed: data to stdout, as a table or JSON; messages to stderr. Tables are styled here and nowhere else.

use std::{
    fmt::Write as _,
    io::{IsTerminal, Write},
    str::FromStr,
    time::Duration,
};

use chrono::{DateTime, SecondsFormat, Utc};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use comfy_table::{Attribute, Cell, CellAlignment, Color, ContentArrangement, Table, presets};
use serde::Serialize;

/// Where data goes.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// Print JSON instead of text.
    pub json: bool,
}

impl Output {
    /// Prints `value` as JSON, or else the text that `text` makes of it.
    pub fn data<T: Serialize + ?Sized>(self, value: &T, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        if self.json { print_json(value) } else { print(&text()) }
    }
}

/// Prints text and a line's end to stdout. Fails when nobody reads it any more.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.trim_end_matches('\n').as_bytes())?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

/// Prints one JSON value: indented for people, on one line for programs.
pub fn print_json<T: Serialize + ?Sized>(value: &T) -> anyhow::Result<()> {
    let text = if std::io::stdout().is_terminal() {
        serde_json::to_string_pretty(value)?
    } else {
        serde_json::to_string(value)?
    };
    print(&text)
}

/// Says something to the person, on stderr.
pub fn say(text: impl AsRef<str>) {
    eprintln!("{}", text.as_ref());
}

/// An empty table with these column heads.
pub fn table(heads: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(heads.iter().map(|head| Cell::new(head).add_attribute(Attribute::Bold)));
    table
}

/// A cell with a number.
pub fn number(value: impl ToString) -> Cell {
    Cell::new(value).set_alignment(CellAlignment::Right)
}

/// A cell with a state of a job, saga, dead letter or service, in its colour.
pub fn state(name: &str) -> Cell {
    let cell = Cell::new(name);
    match name {
        "succeeded" | "completed" | "running" | "replayed" | "applied" | "external" => cell.fg(Color::Green),
        "dead" | "parked" | "crashed" | "failed" | "open" => cell.fg(Color::Red),
        "compensating" | "compensated" | "cancelled" | "pending" => cell.fg(Color::Yellow),
        _ => cell,
    }
}

/// A parser that takes one of these words for what it names.
pub fn one_of<T>(all: &'static [T], word: impl Fn(T) -> &'static str) -> impl TypedValueParser<Value = T>
where
    T: Copy + Send + Sync + FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    PossibleValuesParser::new(all.iter().copied().map(word)).try_map(|text| text.parse())
}

/// A table or, if it has no rows, what to say instead.
pub fn rows(table: &Table, otherwise: &str) -> String {
    if table.row_iter().next().is_none() { otherwise.to_owned() } else { tidy(table) }
}

/// The table's text, flush left and without blanks at the ends of lines.
pub fn tidy(table: &Table) -> String {
    let mut table = table.clone();
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().fold(String::new(), |text, line| text + line.trim_end() + "\n")
}

/// A count with its noun: `1 file`, `2 files`.
pub fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Lines `name  value`; those without a value are left out.
pub fn fields(pairs: &[(&str, Option<String>)]) -> String {
    let width =
        pairs.iter().filter(|(_, value)| value.is_some()).map(|(name, _)| name.len()).max().unwrap_or(0);
    pairs.iter().fold(String::new(), |mut text, (name, value)| {
        if let Some(value) = value {
            let indented = value.replace('\n', &format!("\n{:width$}  ", ""));
            writeln!(text, "{name:width$}  {indented}").ok();
        }
        text
    })
}

/// A point in time, to the millisecond.
pub fn time(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// How long ago, or ahead, a point in time is.
pub fn ago(at: DateTime<Utc>) -> String {
    let past = Utc::now() - at;
    match past.to_std() {
        Ok(past) => format!("{} ago", span(past)),
        Err(_) => format!("in {}", span((-past).to_std().unwrap_or_default())),
    }
}

/// The time between two points; `None` for a negative one, which two machines' clocks can give.
pub fn between(from: DateTime<Utc>, to: DateTime<Utc>) -> Option<Duration> {
    (to - from).to_std().ok()
}

/// A length of time with the two units that matter.
pub fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0 if time < Duration::from_millis(1) => format!("{} µs", time.as_micros()),
        0 => format!("{} ms", time.as_millis()),
        1..=59 => format!("{:.1} s", time.as_secs_f64()),
        60..=3599 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..=86_399 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// The first line of a text, at most `width` characters.
pub fn short(text: &str, width: usize) -> String {
    let line = text.lines().next().unwrap_or_default();
    if line.chars().count() <= width && line.len() == text.len() {
        return line.to_owned();
    }
    let cut: String = line.chars().take(width.saturating_sub(1)).collect();
    format!("{cut}…")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_the_units_that_matter() {
        for (millis, text) in [
            (0, "0 µs"),
            (12, "12 ms"),
            (1500, "1.5 s"),
            (61_000, "1 min 1 s"),
            (7_260_000, "2 h 1 min"),
            (90_000_000, "1 d 1 h"),
        ] {
            assert_eq!(span(Duration::from_millis(millis)), text);
        }
    }

    #[test]
    fn tables_begin_at_the_left_and_lines_end_without_blanks() {
        let mut one = table(&["ID", "NAME"]);
        one.add_row([number(7), "x".into()]);
        assert_eq!(tidy(&one), "ID  NAME\n 7  x\n");
        assert_eq!(rows(&table(&["ID"]), "none"), "none");
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        assert_eq!(short("kurz", 10), "kurz");
        assert_eq!(short("äöüäöüäöü", 4), "äöü…");
        assert_eq!(short("one\ntwo", 10), "one…");
    }

    #[test]
    fn absent_fields_are_left_out() {
        assert_eq!(
            fields(&[("id", Some("1".into())), ("worker", None), ("state", Some("a\nb".into()))]),
            "id     1\nstate  a\n       b\n"
        );
    }
}
