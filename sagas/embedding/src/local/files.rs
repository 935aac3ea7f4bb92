//! The model's folder: which files it must have, and whether they are the published ones.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::EmbedError;

pub(super) const WEIGHTS: &str = "model.safetensors";
pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const CONFIG: &str = "config.json";
/// Only models that do not pool by the mean have it.
pub(super) const POOLING: &str = "1_Pooling/config.json";

/// The command that fetches the default model.
pub(super) const FETCH_COMMAND: &str = "make model";

/// SHA-256 of all-MiniLM-L6-v2 as sentence-transformers published it; scripts/fetch_model.py has the
/// same values.
const ALL_MINILM_L6_V2: [(&str, &str); 3] = [
    (WEIGHTS, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    (TOKENIZER, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    (CONFIG, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
];

/// Checks that `dir` has the three files that a model needs, without reading them.
pub(super) fn check_present(dir: &Path) -> Result<(), EmbedError> {
    match [WEIGHTS, TOKENIZER, CONFIG].into_iter().find(|file| !dir.join(file).is_file()) {
        None => Ok(()),
        Some(file) => Err(missing(dir, file)),
    }
}

pub(super) fn read(dir: &Path, file: &str) -> Result<Vec<u8>, EmbedError> {
    std::fs::read(dir.join(file)).map_err(|error| unreadable(dir, file, &error))
}

pub(super) fn invalid(dir: &Path, reason: impl Into<String>) -> EmbedError {
    EmbedError::ModelInvalid { model: dir.display().to_string(), reason: reason.into() }
}

/// Checks that `dir` holds all-MiniLM-L6-v2 bit for bit as it was published.
///
/// Reads all of its 91 MB: for a command that a person runs, not for every start. The script that
/// fetches the model has checked the same sums.
pub fn verify(dir: &Path) -> Result<(), EmbedError> {
    for (file, expected) in ALL_MINILM_L6_V2 {
        let found = sha256(&dir.join(file)).map_err(|error| unreadable(dir, file, &error))?;
        if found != expected {
            let reason =
                format!("{file} has SHA-256 {found}, not {expected}; delete it and run `{FETCH_COMMAND}`");
            return Err(invalid(dir, reason));
        }
    }
    Ok(())
}

fn missing(dir: &Path, file: &str) -> EmbedError {
    // Absolute, because the default is relative and people start programs from many folders.
    let dir = std::path::absolute(dir).unwrap_or_else(|_| PathBuf::from(dir));
    EmbedError::ModelMissing { dir, file: file.to_owned(), command: FETCH_COMMAND }
}

fn unreadable(dir: &Path, file: &str, error: &io::Error) -> EmbedError {
    if error.kind() == io::ErrorKind::NotFound {
        missing(dir, file)
    } else {
        invalid(dir, format!("{file} can't be read: {error}"))
    }
}

fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut digest = Sha256::new();
    let mut block = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut block)?;
        if read == 0 {
            return Ok(format!("{:x}", digest.finalize()));
        }
        digest.update(&block[..read]);
    }
}
