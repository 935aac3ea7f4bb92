//! How a command ends: exit code 0, 1 for a problem that was asked about, 2 for what could not be done.

use std::{io, process::ExitCode};

use sagas::StoreError;

/// How a command that did its work ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Exit code 0.
    Fine,
    /// Exit code 1: what was asked about has a problem, which was printed.
    Problem,
}

impl Ending {
    /// `Fine` if `good`.
    pub fn fine_if(good: bool) -> Self {
        if good { Self::Fine } else { Self::Problem }
    }
}

/// What every command returns; an error is exit code 2 unless it is a [`Refused`].
pub type Outcome = anyhow::Result<Ending>;

/// The answer to what was asked is no: exit code 1.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// The exit code, after the error was told on stderr.
pub fn report(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(Ending::Fine) => ExitCode::SUCCESS,
        Ok(Ending::Problem) => ExitCode::from(1),
        // Whoever read our output has seen enough, as in `flotilla jobs list | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", sentence(&error));
            if let Some(hint) = hint(&error) {
                eprintln!("hint: {hint}");
            }
            ExitCode::from(if error.is::<Refused>() { 1 } else { 2 })
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe))
}

/// The error and its causes, without those that the text before already holds.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn hint(error: &anyhow::Error) -> Option<&'static str> {
    let store = error.chain().find_map(|cause| cause.downcast_ref::<StoreError>())?;
    let missing = ["relation \"", "schema \"flotilla\"", "function "];
    (store.message.contains("does not exist") && missing.iter().any(|part| store.message.contains(part)))
        .then_some("the database lacks Flotilla's tables, or some of them: run `flotilla migrate up`")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use anyhow::Context as _;
    use sagas::{Class, Dependency};

    use super::*;

    #[test]
    fn causes_are_told_once_and_missing_tables_give_a_hint() {
        let store =
            StoreError::new(Dependency::Postgres, Class::Permanent, "relation \"jobs\" does not exist");
        let error = Err::<(), _>(store).context("can't list jobs").unwrap_err();
        assert_eq!(sentence(&error), "can't list jobs: postgres: relation \"jobs\" does not exist");
        assert!(hint(&error).unwrap().contains("migrate up"));
    }

    #[test]
    fn a_reader_that_went_away_is_no_error() {
        let error = anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe)).context("can't write");
        assert!(is_broken_pipe(&error));
    }
}
