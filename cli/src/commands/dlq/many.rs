//! What is done to all letters that a filter lets through: replay, discard, export. In pages, so that neither memory nor a
//! transaction grows with their number.

use std::{io::Write as _, time::Duration};

use anyhow::Context as _;
use sagas::{
    Class,
    redaction::Redaction,
    stores::postgres::{
        Postgres,
        dead_letters::{DeadLetterFilter, Replay, Resolved},
    },
};
use serde_json::json;
use tokio::time::{Instant, sleep_until};

use super::show_payload;
use crate::{
    context::{Context, actor},
    failure::{Ending, Outcome},
    output,
};

/// Letters whose places are read, or that are closed, at once.
pub const PAGE: i64 = 500;
/// Letters that an export holds at once, with their timelines; of payloads it holds one.
pub const EXPORTED: i64 = 100;

/// How many letters are replayed, and how fast.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// At most so many.
    pub limit: Option<u64>,
    /// At most so many a second.
    pub rate: Option<u32>,
}

/// Replays oldest first. Letters that another operator deals with meanwhile are left to them, and those that die from now on
/// are left out, so that a replay which dies again does not go round.
pub async fn replay(
    mut filter: DeadLetterFilter,
    how: &Replay,
    pace: Pace,
    dry_run: bool,
    postgres: &Postgres,
    context: &Context,
) -> Outcome {
    let (totals, now) = postgres.letter_totals(&filter).await?;
    filter.until = Some(filter.until.map_or(now, |until| until.min(now)));
    if dry_run {
        return preview(&totals, "replayed", pace.limit, context);
    }
    let every = pace.rate.map(|rate| Duration::from_secs(1) / rate);
    let queue = context.dispatcher(postgres).await?;
    let (mut replayed, mut refused, mut left, mut next) = (vec![], 0u64, 0u64, Instant::now());
    'all: loop {
        let page = postgres.letter_places(&filter).await?;
        let Some(last) = page.last() else { break };
        filter.from = Some(*last);
        for (_, id) in page {
            if pace.limit.is_some_and(|limit| replayed.len() as u64 >= limit) {
                break 'all;
            }
            if let Some(every) = every {
                sleep_until(next).await;
                next = next.max(Instant::now()) + every;
            }
            match postgres.replay(id, how).await {
                Ok(Resolved::Done(Some(job))) => {
                    context.dispatch(queue.as_ref(), job, postgres).await;
                    replayed.push((id, job));
                }
                Ok(_) => left += 1,
                // A letter that can't be read keeps none of those behind it waiting.
                Err(error) if error.class == Class::Permanent => {
                    output::say(format!("{id} was not replayed: {error}"));
                    refused += 1;
                }
                Err(error) => {
                    let before = format!("{} letters were replayed before that", replayed.len());
                    return Err(error).context(before);
                }
            }
        }
    }
    let data: Vec<_> = replayed.iter().map(|(id, job)| json!({ "id": id, "job": job })).collect();
    context.out.data(&data, || {
        let lines: Vec<String> =
            replayed.iter().map(|(id, job)| format!("{id} replayed as job {job}")).collect();
        if lines.is_empty() { "nothing was replayed".to_owned() } else { lines.join("\n") }
    })?;
    let others = if left > 0 { format!(", {left} left to somebody who was quicker") } else { String::new() };
    output::say(format!("{}{others}", output::counted(replayed.len(), "letter") + " replayed"));
    Ok(Ending::fine_if(refused == 0))
}

/// Closes letters without a replay.
pub async fn discard(
    mut filter: DeadLetterFilter,
    reason: &str,
    dry_run: bool,
    postgres: &Postgres,
    context: &Context,
) -> Outcome {
    let (totals, now) = postgres.letter_totals(&filter).await?;
    filter.until = Some(filter.until.map_or(now, |until| until.min(now)));
    if dry_run {
        return preview(&totals, "discarded", None, context);
    }
    let (actor, mut discarded) = (actor(), 0);
    loop {
        let closed = postgres.discard_page(&filter, &actor, reason).await?;
        discarded += closed;
        if closed == 0 {
            break;
        }
    }
    context.out.data(&json!({ "discarded": discarded }), || format!("{discarded} letters discarded"))?;
    Ok(Ending::Fine)
}

fn preview(totals: &[(String, String, i64)], verb: &str, limit: Option<u64>, context: &Context) -> Outcome {
    let all = totals.iter().map(|(_, _, count)| count.unsigned_abs()).sum::<u64>();
    let would = limit.map_or(all, |limit| limit.min(all));
    let by: Vec<_> = totals
        .iter()
        .map(|(kind, class, count)| json!({ "kind": kind, "class": class, "letters": count }))
        .collect();
    context.out.data(&json!({ "dry_run": true, "letters": would, "by_kind_and_class": by }), || {
        let mut table = output::table(&["KIND", "CLASS", "LETTERS"]);
        for (kind, class, count) in totals {
            table.add_row([kind.into(), class.into(), output::number(count)]);
        }
        format!("{}{would} letters would be {verb}", output::rows(&table, ""))
    })?;
    Ok(Ending::Fine)
}

/// Writes one line a letter, page by page. One whose payload can't be opened is written without it.
pub async fn export(
    mut filter: DeadLetterFilter,
    payloads: bool,
    postgres: &Postgres,
    redaction: &Redaction,
) -> Outcome {
    let mut complete = true;
    loop {
        let page = postgres.letter_stories(&filter).await?;
        let Some(last) = page.last() else { return Ok(Ending::fine_if(complete)) };
        filter.from = Some((last.letter.created_at, last.letter.id));
        for mut story in page {
            match show_payload(&mut story.letter, payloads, postgres, redaction).await {
                Err(error) if error.class == Class::Permanent => {
                    output::say(format!("{} is written without its payload: {error}", story.letter.id));
                    complete = false;
                }
                shown => shown?,
            }
            let line = serde_json::to_string(&story)?;
            let mut out = std::io::stdout().lock();
            writeln!(out, "{line}")?;
        }
    }
}
