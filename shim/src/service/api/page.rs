//! What every call has that answers a page at a time.

use crate::run::request::Invalid;

/// Items in an answer, unless the caller says otherwise.
const PAGE: u32 = 100;
/// A node gives so many runs at once, and the one that says that there are more.
const PAGE_MOST: u32 = 1000;

/// How many items there may be in the answer.
pub(super) fn size(page_size: u32) -> Result<u32, Invalid> {
    match page_size {
        0 => Ok(PAGE),
        1..=PAGE_MOST => Ok(page_size),
        _ => Err(Invalid::Value {
            field: "page_size",
            given: page_size.to_string(),
            allowed: "0 to 1000",
        }),
    }
}

/// A token that no answer had.
pub(super) fn invalid_token(given: String) -> Invalid {
    Invalid::Value {
        field: "page_token",
        given,
        allowed: "the `next_page_token` of the page before",
    }
}
