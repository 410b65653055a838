//! What the calls that answer in pages have in common.

use crate::run::request::Invalid;

/// Items in an answer, unless the caller says otherwise.
const DEFAULT_PAGE: u32 = 100;
/// A node returns at most this number of runs at once, plus one that shows that there are more.
const MAX_PAGE: u32 = 1000;

/// The largest number of items in the answer.
pub(super) fn size(page_size: u32) -> Result<u32, Invalid> {
    match page_size {
        0 => Ok(DEFAULT_PAGE),
        1..=MAX_PAGE => Ok(page_size),
        _ => Err(Invalid::Value {
            field: "page_size",
            given: page_size.to_string(),
            allowed: "0 to 1000",
        }),
    }
}

/// The error for a token that no answer contained.
pub(super) fn invalid_token(given: String) -> Invalid {
    Invalid::Value {
        field: "page_token",
        given,
        allowed: "the `next_page_token` of the previous page",
    }
}
