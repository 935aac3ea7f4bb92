//! The limit of a job's result, which the ledger keeps for a while.

use queue::{MAX_DEPTH, is_too_deep};
use serde_json::Value;

use crate::error::StepError;

/// Bytes of a result's JSON at most, unless `FLOTILLA_MAX_RESULT` says otherwise.
pub const MAX_RESULT: usize = 64 * 1024;

/// Whether the ledger may keep this result; the error is for good, and names the limit.
pub(crate) fn fits(result: &Value, limit: usize) -> Result<(), StepError> {
    if is_too_deep(result) {
        let message = format!("the result is nested deeper than {MAX_DEPTH} levels");
        return Err(StepError::permanent("result_too_deep", message));
    }
    let size = result.to_string().len();
    if size <= limit {
        return Ok(());
    }
    Err(StepError::permanent(
        "result_too_large",
        format!("the result has {size} bytes: at most {limit} are allowed (FLOTILLA_MAX_RESULT)"),
    ))
}
