//! Text to token ids, as the model's own `tokenizer.json` has it.

use std::path::Path;

use tokenizers::Tokenizer;

use super::files;
use crate::EmbedError;

/// Tokens that surround every text of a BERT-family model: `[CLS]` before it and `[SEP]` after it.
const SPECIAL_TOKENS: usize = 2;

/// A model's tokenizer: read-only, so that threads can share one.
///
/// Usable without the model's weights, where only lengths are needed. Opening takes some 30 ms.
pub struct Tokens {
    tokenizer: Tokenizer,
}

impl Tokens {
    /// Reads `tokenizer.json` from a model's folder.
    pub fn open(dir: &Path) -> Result<Self, EmbedError> {
        let json = files::read(dir, files::TOKENIZER)?;
        let unusable =
            |error: tokenizers::Error| files::invalid(dir, format!("{}: {error}", files::TOKENIZER));
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(unusable)?;
        // The file of all-MiniLM-L6-v2 pads and truncates to 128: that would halve the model's window
        // and waste work on short texts. `encode` cuts by itself.
        tokenizer.with_padding(None).with_truncation(None).map_err(unusable)?;
        Ok(Self { tokenizer })
    }

    /// How many tokens `text` has, without the special ones and without any limit.
    pub fn count(&self, text: &str) -> Result<usize, EmbedError> {
        Ok(self.all(text)?.len().saturating_sub(SPECIAL_TOKENS))
    }

    /// One more than the highest id.
    pub(super) fn id_limit(&self) -> usize {
        self.tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// The ids of `text` between the special ones, at most `max_tokens` with them: a longer text loses
    /// its end, as in the model's training.
    pub(super) fn encode(&self, text: &str, max_tokens: usize) -> Result<Vec<u32>, EmbedError> {
        let mut ids = self.all(text)?;
        if ids.is_empty() {
            // Only with a tokenizer that adds no special tokens.
            return Err(EmbedError::BadInput { index: None, reason: "it has no tokens".to_owned() });
        }
        if ids.len() > max_tokens {
            let closing = ids[ids.len() - 1];
            ids.truncate(max_tokens);
            ids[max_tokens - 1] = closing;
        }
        Ok(ids)
    }

    fn all(&self, text: &str) -> Result<Vec<u32>, EmbedError> {
        match self.tokenizer.encode_fast(text, true) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => {
                Err(EmbedError::BadInput { index: None, reason: format!("not tokenisable: {error}") })
            }
        }
    }
}
