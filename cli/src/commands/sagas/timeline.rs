//! Draws a saga run: one line a step, with a bar where in time it was.

use std::fmt::Write as _;

use chrono::{DateTime, Utc};
use sagas::stores::postgres::{
    inspect::{JobView, SagaView, StepView},
    waits::WaitView,
};

use crate::output::{between, span, time};

/// Characters of the whole bar.
pub const WIDTH: usize = 48;

/// The run's head, its wait in the queue, and its steps in the order they happened, by delivery.
///
/// Times of the steps are of the workers' clocks and those of the job of Postgres' clock, so the wait may be off by what
/// the clocks differ; a negative one is drawn as none.
pub fn draw(job: &JobView, saga: &SagaView, steps: &[StepView], width: usize) -> String {
    let mut text = head(job, saga);
    let begin = steps.iter().map(|step| step.started_at).min().unwrap_or(saga.created_at);
    // A scheduled job begins to wait when it is due.
    let from = job.created_at.max(job.run_at.min(begin)).min(begin);
    // The transaction that publishes ends the job, too: it is a moment, not a logged step.
    let end = job.finished_at.filter(|_| saga.finished_at.is_some() || saga.state == "finishing");
    let to = steps.iter().map(|step| step.ended_at).chain(end).max().unwrap_or(begin).max(begin);
    let scale = Scale { from, to, width };
    let name_width =
        steps.iter().map(|step| label(step).chars().count()).max().unwrap_or(0).max("cancelled".len());

    writeln!(text).ok();
    if let Some(waited) = between(from, begin) {
        line(&mut text, name_width, "queued", &scale.bar(from, begin, '·'), &span(waited));
    }
    let deliveries = steps.iter().map(|step| step.fence).collect::<std::collections::BTreeSet<_>>();
    let mut fence = None;
    for step in steps {
        if deliveries.len() > 1 && fence != Some(step.fence) {
            fence = Some(step.fence);
            writeln!(text, "  delivery under fence {}", step.fence).ok();
        }
        let fill = match (step.state.as_str(), step.direction.as_str()) {
            ("failed", _) => '▒',
            (_, "compensate") => '◀',
            _ => '█',
        };
        let mut note = span(between(step.started_at, step.ended_at).unwrap_or_default());
        if step.attempts > 1 {
            write!(note, ", {} tries", step.attempts).ok();
        }
        if step.state == "failed" {
            note += ", failed";
        }
        line(&mut text, name_width, &label(step), &scale.bar(step.started_at, step.ended_at, fill), &note);
        if let Some(error) = &step.error {
            writeln!(text, "  {:name_width$}  └ {error}", "").ok();
        }
    }
    if let Some(end) = end {
        line(
            &mut text,
            name_width,
            job.state.as_str(),
            &scale.bar(end, end, '◆'),
            &format!("at {}", time(end)),
        );
    }
    if steps.is_empty() {
        writeln!(text, "  no step has ended yet").ok();
    } else if let Some(whole) = between(from, to) {
        writeln!(text, "  {:name_width$}  {:width$}  {} in all", "", "", span(whole)).ok();
    }
    text
}

/// What the run waited for without holding a slot, a line each.
pub fn waits(waits: &[WaitView]) -> String {
    let mut text = String::new();
    for wait in waits {
        let what = match wait.kind.as_str() {
            "timer" => format!("timer {}", wait.name),
            "signal" => format!("signal {}", wait.name),
            _ => format!("children {} (batch {})", wait.name, wait.batch_id.unwrap_or_default()),
        };
        let how = match (wait.ended_at, wait.outcome.as_deref()) {
            (Some(at), Some("timed_out")) => format!("given up at {}", time(at)),
            (Some(at), _) => format!("over at {}", time(at)),
            (None, _) => match wait.due_at {
                Some(due) => format!("waiting, until {} at the latest", time(due)),
                None => "waiting".to_owned(),
            },
        };
        writeln!(text, "  waits for {what} since {}: {how}", time(wait.created_at)).ok();
    }
    text
}

fn head(job: &JobView, saga: &SagaView) -> String {
    let mut text = format!("saga {}  {} v{}  {}\n", saga.id, saga.kind, saga.definition_version, saga.state);
    let document = job.document.as_ref().map(|d| format!(" on document {d}")).unwrap_or_default();
    writeln!(text, "job  {}  {} of tenant {}{document}: {}", job.id, job.kind, job.tenant, job.state).ok();
    writeln!(
        text,
        "began {}, deliveries {}, lost {}",
        time(saga.created_at),
        job.deliveries,
        job.lost_deliveries
    )
    .ok();
    if let Some(error) = &saga.error {
        writeln!(text, "turned back by: {error}").ok();
    }
    if let (Some(at), Some(by), Some(why)) = (saga.resolved_at, &saga.resolved_by, &saga.resolution) {
        writeln!(text, "closed by {by} at {}: {why}", time(at)).ok();
    }
    if saga.state == "finishing" {
        writeln!(text, "published; the version before is removed when its grace period is over").ok();
    }
    text
}

/// A step's name; a compensation is marked.
fn label(step: &StepView) -> String {
    if step.direction == "compensate" { format!("undo {}", step.step_name) } else { step.step_name.clone() }
}

fn line(text: &mut String, name_width: usize, name: &str, bar: &str, note: &str) {
    writeln!(text, "  {name:name_width$}  {bar}  {note}").ok();
}

/// Maps times to columns.
struct Scale {
    from: DateTime<Utc>,
    to: DateTime<Utc>,
    width: usize,
}

impl Scale {
    fn column(&self, at: DateTime<Utc>) -> usize {
        let micros = |span: chrono::TimeDelta| span.num_microseconds().unwrap_or(i64::MAX).max(0) as f64;
        let whole = micros(self.to - self.from).max(1.0);
        let part = (micros(at - self.from) / whole).clamp(0.0, 1.0);
        (part * self.width as f64).round() as usize
    }

    /// A bar of at least one character, so that no step is invisible.
    fn bar(&self, start: DateTime<Utc>, end: DateTime<Utc>, fill: char) -> String {
        let first = self.column(start).min(self.width.saturating_sub(1));
        let last = self.column(end).clamp(first + 1, self.width.max(first + 1));
        let filled: String = std::iter::repeat_n(fill, last - first).collect();
        format!("{:first$}{filled}{:rest$}", "", "", rest = self.width.saturating_sub(last))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use sagas::{JobState, RunState};

    use super::*;

    fn at(millis: i64) -> DateTime<Utc> {
        DateTime::from_timestamp_millis(1_700_000_000_000 + millis).unwrap()
    }

    fn step(fence: i64, seq: i32, name: &str, direction: &str, state: &str, from: i64, to: i64) -> StepView {
        StepView {
            fence,
            seq,
            step_name: name.to_owned(),
            direction: direction.to_owned(),
            state: state.to_owned(),
            attempts: if state == "failed" { 3 } else { 1 },
            started_at: at(from),
            ended_at: at(to),
            error: (state == "failed").then(|| "vectors: refused".to_owned()),
        }
    }

    fn job() -> JobView {
        JobView {
            id: uuid::Uuid::nil(),
            kind: "ingest".to_owned(),
            queue: "ingest".to_owned(),
            priority: 5,
            tenant: "default".to_owned(),
            state: JobState::Dead,
            outcome: None,
            result: None,
            document: Some("a.md".to_owned()),
            doc_order: Some(1),
            deliveries: 2,
            lost_deliveries: 1,
            attempts: 0,
            max_attempts: 5,
            run_at: at(0),
            worker: None,
            last_error: None,
            parent: None,
            replay_of: None,
            batch_id: None,
            progress: None,
            progress_message: None,
            result_key_id: None,
            traceparent: None,
            cancel_requested_at: None,
            created_at: at(0),
            taken_at: Some(at(20)),
            finished_at: Some(at(100)),
        }
    }

    fn saga() -> SagaView {
        SagaView {
            id: uuid::Uuid::nil(),
            job_id: uuid::Uuid::nil(),
            kind: "ingest".to_owned(),
            definition_version: 1,
            tenant: "default".to_owned(),
            state: RunState::Compensated,
            next_step: 1,
            verdict: None,
            error: Some("vectors: refused".to_owned()),
            created_at: at(20),
            finished_at: Some(at(100)),
            resolved_at: None,
            resolved_by: None,
            resolution: None,
        }
    }

    #[test]
    fn bars_stand_where_the_steps_were() {
        let steps = [
            step(1, 0, "stage", "execute", "succeeded", 20, 40),
            step(2, 0, "vectors", "execute", "failed", 60, 80),
            step(2, 1, "stage", "compensate", "succeeded", 80, 100),
        ];
        let text = draw(&job(), &saga(), &steps, 10);
        let drawn: Vec<&str> = text.lines().skip_while(|line| !line.is_empty()).skip(1).collect();
        assert_eq!(
            drawn,
            [
                "  queued      ··          20 ms",
                "  delivery under fence 1",
                "  stage         ██        20 ms",
                "  delivery under fence 2",
                "  vectors           ▒▒    20 ms, 3 tries, failed",
                "              └ vectors: refused",
                "  undo stage          ◀◀  20 ms",
                "  dead                 ◆  at 2023-11-14T22:13:20.100Z",
                "                          100 ms in all",
            ],
            "{text}"
        );
        assert!(text.contains("turned back by: vectors: refused"), "{text}");
    }

    #[test]
    fn a_run_without_steps_and_clocks_that_differ_are_drawn() {
        assert!(draw(&job(), &saga(), &[], 10).contains("no step has ended yet"));
        // The worker's clock is behind: its first step seems to begin before the job was accepted.
        let text = draw(&job(), &saga(), &[step(1, 0, "stage", "execute", "succeeded", -50, -50)], 10);
        assert!(text.contains("stage      █"), "{text}");
    }
}
