//! Splits a document's text into the pieces that are embedded.

/// Limits of one chunk, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunking {
    /// Longest chunk. 1,000 characters are about 200-250 tokens of English, within the 256 tokens that the local model reads.
    pub max_chars: usize,
    /// How many characters of a chunk's end the next one repeats, so that a sentence on the border is found whole.
    pub overlap_chars: usize,
    /// Most chunks of one document; more is a permanent error.
    pub max_chunks: usize,
}

impl Default for Chunking {
    fn default() -> Self {
        Self { max_chars: 1000, overlap_chars: 100, max_chunks: 4096 }
    }
}

/// The text's chunks in order; each ends at a paragraph, a sentence or a word where one is found in its last half, and
/// none is empty or only white space. The same text gives the same chunks.
pub fn split(text: &str, limits: Chunking) -> Vec<String> {
    let chars: Vec<(usize, char)> = text.char_indices().collect();
    let at = |i: usize| chars.get(i).map_or(text.len(), |(byte, _)| *byte);
    let mut chunks = vec![];
    let mut start = 0;
    while start < chars.len() {
        let limit = (start + limits.max_chars.max(1)).min(chars.len());
        let end = if limit == chars.len() { limit } else { boundary(&chars, start, limit) };
        let piece = text[at(start)..at(end)].trim();
        if !piece.is_empty() {
            chunks.push(piece.to_owned());
        }
        if end == chars.len() {
            break;
        }
        // Always forward, also when the overlap is as long as the chunk.
        let back = end.saturating_sub(limits.overlap_chars);
        start = word_start(&chars, back.max(start + 1), end);
    }
    chunks
}

/// The best end in the last half of `start..limit`.
fn boundary(chars: &[(usize, char)], start: usize, limit: usize) -> usize {
    let half = start + (limit - start) / 2;
    let space = |i: usize| chars[i].1.is_whitespace();
    let find = |good: &dyn Fn(usize) -> bool| (half.max(1)..limit).rev().find(|&i| good(i));
    find(&|i| chars[i].1 == '\n' && chars[i - 1].1 == '\n')
        .or_else(|| find(&|i| space(i) && matches!(chars[i - 1].1, '.' | '!' | '?' | '。')))
        .or_else(|| find(&space))
        .map_or(limit, |i| i + 1)
}

/// The first start of a word in `from..to`, so that an overlap does not begin inside one. `from` is at least 1.
fn word_start(chars: &[(usize, char)], from: usize, to: usize) -> usize {
    (from..to).find(|&i| chars[i - 1].1.is_whitespace()).unwrap_or(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_text_is_one_chunk_and_white_space_is_none() {
        assert_eq!(split(" hello \n", Chunking::default()), ["hello"]);
        assert!(split(" \n\t ", Chunking::default()).is_empty());
    }

    #[test]
    fn chunks_cover_the_text_in_order_within_the_limit() {
        let words: Vec<String> =
            (0..2000).map(|i| format!("word{i}{}", if i % 9 == 0 { "." } else { "" })).collect();
        let text = words.join(" ");
        let limits = Chunking { max_chars: 300, overlap_chars: 40, ..Chunking::default() };
        let chunks = split(&text, limits);
        assert!(chunks.iter().all(|c| c.chars().count() <= 300));
        for i in 0..2000 {
            assert!(
                chunks
                    .iter()
                    .any(|c| c.split_whitespace().any(|w| w.trim_end_matches('.') == format!("word{i}"))),
                "word{i}"
            );
        }
    }

    #[test]
    fn text_without_any_space_still_ends() {
        let text = "é".repeat(5000);
        let chunks = split(&text, Chunking { max_chars: 100, overlap_chars: 100, ..Chunking::default() });
        assert_eq!(chunks.len(), 50);
    }
}
