//! Texts for documents.

/// A text of about 2,400 characters, three chunks, all of whose words name the document and the revision, so that no two
/// texts share a chunk and a search for one finds its own document first.
pub fn text(document: &str, revision: u32) -> String {
    let line = |paragraph: usize, line: usize| {
        format!(
            "Document {document} in revision {revision} says in line {line} of paragraph {paragraph} word{document}x{revision}."
        )
    };
    (0..4)
        .map(|paragraph| (0..8).map(|no| line(paragraph, no)).collect::<Vec<_>>().join(" "))
        .collect::<Vec<_>>()
        .join("\n\n")
}
