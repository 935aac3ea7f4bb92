//! Texts that tell which document and revision they are of, in every chunk.

use sha2::{Digest, Sha256};

/// Revisions from here on are of jobs that must fail: nobody may ever see them.
pub const DOOMED: u64 = 1_000_000;

/// The text of a revision: about 1,500 characters, several chunks.
pub fn text(document: &str, revision: u64) -> String {
    let line = |paragraph: usize, line: usize| {
        format!(
            "Document {document} in revision {revision} says in line {line} of paragraph {paragraph} word{document}x{revision}."
        )
    };
    (0..3)
        .map(|paragraph| (0..6).map(|no| line(paragraph, no)).collect::<Vec<_>>().join(" "))
        .collect::<Vec<_>>()
        .join("\n\n")
}

/// The documents and revisions that a text, or a piece of one, speaks of.
pub fn told(text: &str) -> Vec<(&str, u64)> {
    let mut told: Vec<(&str, u64)> = text
        .split("Document ")
        .skip(1)
        .filter_map(|rest| {
            let (document, rest) = rest.split_once(" in revision ")?;
            let revision = rest.split_once(' ')?.0.parse().ok()?;
            Some((document, revision))
        })
        .collect();
    told.dedup();
    told
}

/// As the ledger records it.
pub fn hash(text: &str) -> String {
    let digits =
        |byte: &u8| [byte >> 4, byte & 15].map(|digit| char::from_digit(digit.into(), 16).unwrap_or('?'));
    Sha256::digest(text.as_bytes()).iter().flat_map(digits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_and_its_lines_tell_what_they_are_of() {
        let text = text("doc-3", 17);
        assert_eq!(told(&text), [("doc-3", 17)]);
        assert!(text.split(". ").all(|line| told(line) == [("doc-3", 17)]));
        assert!(told("nothing of the kind").is_empty());
    }
}
