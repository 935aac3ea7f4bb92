//! The log files of the services.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::error::{IoContext, StartError};

/// Size in bytes above which a log is moved to `<log>.old` at the next start, so that logs don't grow for ever.
const LIMIT: u64 = 16 * 1024 * 1024;
/// How much of a log's end is read to find its last lines (bytes).
const TAIL_BYTES: u64 = 64 * 1024;
/// Lines shown in an error.
const TAIL_LINES: usize = 25;
/// Lines shown by `logs` before it follows.
const SHOWN_LINES: usize = 200;
/// How often a followed log is looked at.
const FOLLOW_POLL: Duration = Duration::from_millis(200);

pub(crate) fn rotate(log: &Path) -> Result<(), StartError> {
    if fs::metadata(log).is_ok_and(|meta| meta.len() > LIMIT) {
        fs::rename(log, log.with_extension("log.old")).context("cannot rename", log)?;
    }
    Ok(())
}

/// The last lines, for an error message. An unreadable log is told instead of failing the error.
pub(crate) fn tail(log: &Path) -> String {
    match read_tail(log, TAIL_LINES) {
        Ok((text, _)) if text.is_empty() => "(the log is empty)".into(),
        Ok((text, _)) => text,
        Err(error) => format!("(the log can't be read: {error})"),
    }
}

fn read_tail(log: &Path, lines: usize) -> std::io::Result<(String, u64)> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let start = text.trim_end().rmatch_indices('\n').nth(lines - 1).map_or(0, |(at, _)| at + 1);
    Ok((text[start..].to_owned(), length))
}

/// Writes the last lines of a log to `out`; with `follow` goes on with what is appended, until cancelled.
///
/// Cancel-safe: at worst a part of the last chunk was written.
pub(crate) async fn show(
    log: &Path,
    follow: bool,
    out: &mut (impl AsyncWrite + Unpin),
) -> Result<(), StartError> {
    let (text, mut position) = read_tail(log, SHOWN_LINES).context("cannot read", log)?;
    out.write_all(text.as_bytes()).await.context("cannot write the log of", log)?;
    out.flush().await.context("cannot write the log of", log)?;
    if !follow {
        return Ok(());
    }
    loop {
        tokio::time::sleep(FOLLOW_POLL).await;
        // Opened anew each time, because a restart may have moved the file away.
        let mut file = File::open(log).context("cannot read", log)?;
        let length = file.metadata().context("cannot read", log)?.len();
        if length < position {
            position = 0;
        }
        file.seek(SeekFrom::Start(position)).context("cannot read", log)?;
        let mut fresh = Vec::new();
        position += file.take(TAIL_BYTES).read_to_end(&mut fresh).context("cannot read", log)? as u64;
        out.write_all(&fresh).await.context("cannot write the log of", log)?;
        out.flush().await.context("cannot write the log of", log)?;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fmt::Write as _;

    use super::*;

    #[test]
    fn the_tail_holds_the_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("x.log");
        let text = (0..10_000).fold(String::new(), |mut text, line| {
            writeln!(text, "line {line}").unwrap();
            text
        });
        fs::write(&log, &text).unwrap();
        let (last, length) = read_tail(&log, 2).unwrap();
        assert_eq!(last, "line 9998\nline 9999\n");
        assert_eq!(length, text.len() as u64);
        fs::write(&log, "only\n").unwrap();
        assert_eq!(tail(&log), "only\n");
    }
}
