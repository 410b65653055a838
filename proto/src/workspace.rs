//! Checks the files of a run, on every side: the shim to inform its caller, the driver
//! because a shim may be wrong, init because it writes them.

use std::{collections::BTreeSet, path::Path};

use glob::{MatchOptions, Pattern};

use crate::{
    exec::{Invalid, invalid},
    init::{ArtifactRules, InputFile, TerminalSize},
};

/// The folder of a run's files in its container.
pub const PATH: &str = "/workspace";
/// Most bytes of files, and of artifacts.
pub const MAX_BYTES: u64 = 256 << 20;
/// Most files that a run may bring, and artifacts that it may leave.
pub const MAX_FILES: usize = 1000;
/// Most bytes of a file's path, or of a pattern.
pub const MAX_PATH: usize = 1024;
/// Most patterns that select artifacts.
pub const MAX_PATTERNS: usize = 100;

/// As in shells, only a dot in the pattern matches a leading dot.
const MATCHING: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: true,
};

/// Checks the files of a run; returns their total bytes.
///
/// # Errors
/// [`Invalid`] names the first file that cannot be written as described.
pub fn check_files(files: &[InputFile]) -> Result<u64, Invalid> {
    if files.len() > MAX_FILES {
        let problem = format!(
            "has {} entries; at most {MAX_FILES} are allowed",
            files.len()
        );
        return Err(invalid("files", problem));
    }
    let mut total: u64 = 0;
    let mut folders = BTreeSet::new();
    let mut paths = BTreeSet::new();
    for (index, InputFile { path, mode, size }) in files.iter().enumerate() {
        let field = |name: &str| format!("files[{index}].{name}");
        check_path(path).map_err(|problem| invalid(field("path"), problem))?;
        if *mode > 0o777 {
            let problem = format!("is {mode:#o}; must be permission bits up to 0o777");
            return Err(invalid(field("mode"), problem));
        }
        total = total.saturating_add(*size);
        if total > MAX_BYTES {
            let problem =
                format!("brings all files to {total} bytes; at most {MAX_BYTES} are allowed");
            return Err(invalid(field("size"), problem));
        }
        if !paths.insert(path.as_str()) {
            return Err(invalid(field("path"), format!("`{path}` is used twice")));
        }
        let above = Path::new(path).ancestors().skip(1);
        folders.extend(above.filter_map(Path::to_str));
    }
    match files.iter().position(|file| folders.contains(&*file.path)) {
        Some(index) => {
            let problem = format!("`{}` is also a folder of another file", files[index].path);
            Err(invalid(format!("files[{index}].path"), problem))
        }
        None => Ok(total),
    }
}

/// Checks a path relative to the workspace.
///
/// # Errors
/// A text that says what is wrong with the path.
pub fn check_path(path: &str) -> Result<(), String> {
    if path.is_empty() || path.len() > MAX_PATH {
        return Err(format!(
            "has {} bytes; must have 1 to {MAX_PATH}",
            path.len()
        ));
    }
    // `components` would ignore `.` and double slashes.
    let is_plain = |part: &str| !matches!(part, "" | "." | "..") && part.len() <= 255;
    if path.chars().any(char::is_control) || !path.split('/').all(is_plain) {
        return Err(format!(
            "is {path:?}, which is not a path below the workspace"
        ));
    }
    Ok(())
}

/// The pattern that matches this path alone.
#[must_use]
pub fn literal(path: &str) -> String {
    Pattern::escape(path)
}

/// Checks the rules that select a run's artifacts.
///
/// # Errors
/// [`Invalid`] names the first field that is not valid.
pub fn check_rules(rules: &ArtifactRules) -> Result<(), Invalid> {
    let ArtifactRules {
        patterns,
        max_bytes,
        max_files,
    } = rules;
    if !(1..=MAX_PATTERNS).contains(&patterns.len()) {
        let given = patterns.len();
        let problem = format!("has {given} entries; must have 1 to {MAX_PATTERNS}");
        return Err(invalid("artifacts.patterns", problem));
    }
    Patterns::new(rules)?;
    let range = |field: &str, given: u64, most: u64| {
        let is_in = (1..=most).contains(&given);
        let refused = || invalid(field, format!("is {given}; must be 1 to {most}"));
        is_in.then_some(()).ok_or_else(refused)
    };
    range("artifacts.max_bytes", *max_bytes, MAX_BYTES)?;
    range("artifacts.max_files", (*max_files).into(), MAX_FILES as u64)
}

/// Checks the size of a terminal; the kernel stores two 16-bit numbers.
///
/// # Errors
/// [`Invalid`] names the field.
pub fn check_size(field: &str, size: TerminalSize) -> Result<(), Invalid> {
    for (name, given) in [("rows", size.rows), ("columns", size.columns)] {
        if !(1..=u32::from(u16::MAX)).contains(&given) {
            let problem = format!("is {given}; must be 1 to {}", u16::MAX);
            return Err(invalid(format!("{field}.{name}"), problem));
        }
    }
    Ok(())
}

/// Matching backtracks for each star: many stars would take forever.
fn check_stars(pattern: &str) -> Result<(), String> {
    let parts = || pattern.split('/');
    let stars = |part: &str| part.matches('*').count();
    let is_any = |part: &&str| *part == "**";
    if parts().filter(is_any).count() > 2 || parts().any(|part| stars(part) > 3) {
        let problem = "which has too many stars; at most two `**`, and three `*` between two slashes, are allowed";
        return Err(format!("is `{pattern}`, {problem}"));
    }
    Ok(())
}

/// The patterns that select artifacts.
#[derive(Debug)]
pub struct Patterns(Vec<Pattern>);

impl Patterns {
    /// # Errors
    /// [`Invalid`] names the first pattern that is not valid.
    pub fn new(rules: &ArtifactRules) -> Result<Self, Invalid> {
        let parse = |(index, text): (usize, &String)| {
            let refused = |problem| invalid(format!("artifacts.patterns[{index}]"), problem);
            check_path(text).map_err(refused)?;
            check_stars(text).map_err(refused)?;
            Pattern::new(text).map_err(|error| refused(format!("is `{text}`: {}", error.msg)))
        };
        let patterns = rules.patterns.iter().enumerate().map(parse);
        patterns.collect::<Result<_, _>>().map(Self)
    }

    /// Whether the file at this path, relative to the workspace, matches.
    #[must_use]
    pub fn want(&self, path: &str) -> bool {
        let wants = |pattern: &Pattern| pattern.matches_with(path, MATCHING);
        self.0.iter().any(wants)
    }

    /// The patterns that match none of these paths.
    pub fn unmatched(&self, paths: &[&str]) -> impl Iterator<Item = &str> {
        let is_matched = |pattern: &&Pattern| {
            let mut paths = paths.iter();
            paths.any(|path| pattern.matches_with(path, MATCHING))
        };
        let unmatched = self.0.iter().filter(move |pattern| !is_matched(pattern));
        unmatched.map(Pattern::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(path: &str) -> InputFile {
        InputFile {
            path: path.into(),
            mode: 0o644,
            size: 1,
        }
    }

    fn refused(files: &[InputFile]) -> String {
        check_files(files).unwrap_err().to_string()
    }

    #[test]
    fn files_stay_below_the_workspace() {
        assert_eq!(
            check_files(&[file("a"), file("b/c.txt"), file("b/d")]),
            Ok(3)
        );
        for path in ["", "/a", "..", "a/../b", "./a", "a//b", "a/", "a\nb", "a\0"] {
            assert!(
                refused(&[file(path)]).starts_with("`files[0].path`"),
                "{path}"
            );
        }
        assert!(refused(&[file(&"a".repeat(256))]).contains("not a path"));
        assert!(refused(&[file(&"a/".repeat(600))]).contains("1200 bytes"));
    }

    #[test]
    fn no_file_is_in_the_way_of_another() {
        assert!(refused(&[file("a"), file("a")]).contains("is used twice"));
        assert!(refused(&[file("a/b/c"), file("a/b")]).contains("is also a folder"));
    }

    #[test]
    fn files_fit_the_workspace() {
        let many: Vec<_> = (0..=MAX_FILES).map(|n| file(&n.to_string())).collect();
        assert!(refused(&many).starts_with("`files` has 1001 entries"));
        let large = |size| InputFile { size, ..file("a") };
        assert!(check_files(&[large(MAX_BYTES)]).is_ok());
        assert!(refused(&[large(u64::MAX)]).starts_with("`files[0].size`"));
        let mode = InputFile {
            mode: 0o4755,
            ..file("a")
        };
        assert!(refused(&[mode]).starts_with("`files[0].mode` is 0o4755"));
    }

    fn rules(patterns: &[&str]) -> ArtifactRules {
        ArtifactRules {
            patterns: patterns.iter().map(|text| (*text).to_owned()).collect(),
            max_bytes: 1,
            max_files: 1,
        }
    }

    #[test]
    fn patterns_are_those_of_shells() {
        let patterns = Patterns::new(&rules(&["out/*.txt", "**/log", "exact"])).unwrap();
        for wanted in ["out/a.txt", "log", "a/b/log", "exact"] {
            assert!(patterns.want(wanted), "{wanted}");
        }
        for other in [
            "out/a/b.txt",
            "out/.a.txt",
            ".a/log",
            "a/out/b.txt",
            "exact/a",
            "catalog",
        ] {
            assert!(!patterns.want(other), "{other}");
        }
    }

    #[test]
    fn rules_that_cannot_be_kept_are_refused_by_name() {
        let refused = |rules: &ArtifactRules| check_rules(rules).unwrap_err().field;
        assert_eq!(refused(&rules(&[])), "artifacts.patterns");
        for pattern in ["", "/etc/*", "../*", "[", "a**", "*a*b*c*", "**/**/**/a"] {
            assert_eq!(refused(&rules(&["a", pattern])), "artifacts.patterns[1]");
        }
        let none = ArtifactRules {
            max_bytes: 0,
            ..rules(&["a"])
        };
        assert_eq!(refused(&none), "artifacts.max_bytes");
        let many = ArtifactRules {
            max_files: 1001,
            ..rules(&["a"])
        };
        assert_eq!(refused(&many), "artifacts.max_files");
        assert!(check_rules(&rules(&["a"])).is_ok());
    }

    #[test]
    fn a_terminal_has_a_size() {
        let size = |rows, columns| check_size("terminal", TerminalSize { rows, columns });
        assert!(size(24, 80).is_ok());
        assert_eq!(size(0, 80).unwrap_err().field, "terminal.rows");
        assert_eq!(size(24, 70_000).unwrap_err().field, "terminal.columns");
    }

    proptest! {
        #[test]
        fn whatever_is_taken_as_a_path_stays_below(path in "[./a ]{0,12}") {
            if check_files(&[file(&path)]).is_ok() {
                let normal = |part| matches!(part, std::path::Component::Normal(_));
                prop_assert!(Path::new(&path).components().all(normal));
            }
        }

        #[test]
        fn any_pattern_is_taken_or_refused(pattern in "\\PC{0,20}", path in "\\PC{0,20}") {
            if let Ok(patterns) = Patterns::new(&rules(&[&pattern])) {
                let _either = patterns.want(&path);
            }
        }
    }
}
