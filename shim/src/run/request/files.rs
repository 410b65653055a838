//! The files of a run, its artifacts, and its terminal, as the caller asks for them.

use bytes::Bytes;
use polydev_proto::{
    exec,
    init::{ArtifactRules, InputFile, TerminalSize},
    runtime::{self, input_file},
    workspace,
};

use super::Invalid;

/// Input that came with the start message and that the shim gives to the run: the content of the
/// run's files, and a prompt that is too long for an argument.
#[derive(Debug, Clone)]
pub struct Own {
    /// The offset in the input stream at which the bytes begin.
    pub from: u64,
    pub bytes: Bytes,
    /// Whether these bytes end the input.
    pub closes: bool,
}

impl Own {
    /// The offset in the input stream at which the bytes end.
    pub(in crate::run) fn end(&self) -> u64 {
        self.from + self.bytes.len() as u64
    }
}

/// Default mode of files.
const DEFAULT_MODE: u32 = 0o644;
/// Default limits of artifacts.
const DEFAULT_ARTIFACT_BYTES: u64 = 64 << 20;
const DEFAULT_ARTIFACTS: u64 = 100;

/// The files of a run, and their bytes if these came with the start message.
pub(super) fn files(
    given: Vec<runtime::InputFile>,
) -> Result<(Vec<InputFile>, Vec<Bytes>), Invalid> {
    let (count, mut contents) = (given.len(), Vec::new());
    let file = |file: runtime::InputFile| InputFile {
        path: file.path,
        mode: if file.mode == 0 {
            DEFAULT_MODE
        } else {
            file.mode
        },
        size: match file.source {
            None => 0,
            Some(input_file::Source::Size(size)) => size,
            Some(input_file::Source::Content(content)) => {
                let size = content.len() as u64;
                contents.push(content);
                size
            }
        },
    };
    let files = given.into_iter().map(file).collect();
    if !contents.is_empty() && contents.len() < count {
        return Err(Invalid::Value {
            field: "files",
            given: format!("{} of {count} with their content", contents.len()),
            allowed: "all with their `content`, or none",
        });
    }
    Ok((files, contents))
}

pub(super) fn own_input(
    contents: Vec<Bytes>,
    files_bytes: u64,
    stdin: Option<Bytes>,
    callers_stdin: bool,
) -> Option<Own> {
    let from = if contents.is_empty() { files_bytes } else { 0 };
    let closes = !callers_stdin;
    let parts: Vec<_> = contents.into_iter().chain(stdin).collect();
    let bytes = parts.concat().into();
    (!parts.is_empty()).then_some(Own {
        from,
        bytes,
        closes,
    })
}

pub(super) fn rules(rules: runtime::ArtifactRules) -> Result<ArtifactRules, exec::Invalid> {
    let or = |given, default| if given == 0 { default } else { given };
    let rules = ArtifactRules {
        patterns: rules.patterns,
        max_bytes: or(rules.max_bytes, DEFAULT_ARTIFACT_BYTES),
        max_files: u32::try_from(or(rules.max_files.into(), DEFAULT_ARTIFACTS)).unwrap_or(u32::MAX),
    };
    workspace::check_rules(&rules)?;
    Ok(rules)
}

pub(super) fn terminal(size: runtime::TerminalSize) -> Result<TerminalSize, exec::Invalid> {
    let runtime::TerminalSize { rows, columns } = size;
    let size = TerminalSize { rows, columns };
    workspace::check_size("terminal", size)?;
    Ok(size)
}
