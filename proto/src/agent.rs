//! What an agent does, as bytes of [`Stream::Events`](crate::stream::Stream::Events): lines of JSON,
//! each an `AgentEvent` of `polydev.runtime.v1` with the field names of the protocol. Whoever has
//! lost some of the bytes continues with the next line.

/// Longest line with its end, in bytes.
pub const MAX_LINE: usize = 64 << 10;

/// Longest text in a line, in bytes, before JSON escapes it.
pub const MAX_TEXT: usize = 8 << 10;

/// Most calls of tools that may wait for an answer in one run.
pub const MAX_CALLS: usize = 16;

/// Longest name of a tool in a call that waits, in bytes.
pub const MAX_TOOL_NAME: usize = 256;

/// Longest arguments of a call that waits, in bytes.
pub const MAX_ARGUMENTS: usize = 256 << 10;
