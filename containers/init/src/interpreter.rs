//! A Python that has imported what scripts import, and waits for the script of the run. It then is
//! the script's process: a container has one run, so nothing is forked, and the threads of
//! libraries live on.

use std::{
    fs::File,
    io::{self, pipe},
    os::{fd::OwnedFd, unix::ffi::OsStringExt},
    process::Command,
};

use polydev_proto::init::{Script, Start, Variable};

/// What it runs, see there.
const PROGRAM: &str = include_str!("interpreter.py");
/// Keeps the program's names out of the script's module, `__main__`.
const LOADER: &str = "import sys; exec(sys.argv.pop(1), {'__name__': 'polydev_interpreter'})";
/// How scripts start Python, and so how it waits.
const PYTHON: &str = "python";

/// The command that waits.
pub(crate) fn waiting(imports: &[String]) -> Command {
    let mut command = Command::new(PYTHON);
    command.args(["-c", LOADER, PROGRAM]).args(imports);
    command
}

/// The script of a run whose argv is `python FILE [ARGUMENT...]`; `None` for any other command.
pub(crate) fn script_of(start: &Start) -> Option<Script> {
    let [python, file, ..] = &start.argv[..] else {
        return None;
    };
    let is_file = !file.is_empty() && !file.starts_with(b"-");
    if python != PYTHON.as_bytes() || !is_file || start.terminal.is_some() || start.task.is_some() {
        return None;
    }
    let work_dir = match start.work_dir.as_str() {
        "" => std::env::current_dir().ok()?.into_os_string().into_vec(),
        given => given.as_bytes().to_vec(),
    };
    let trace = start
        .trace
        .iter()
        .filter(|trace| !trace.traceparent.is_empty());
    let trace = trace.flat_map(|trace| {
        [
            ("TRACEPARENT", &trace.traceparent),
            ("TRACESTATE", &trace.tracestate),
        ]
    });
    let trace = trace.map(|(name, value)| Variable {
        name: name.into(),
        value: value.clone().into(),
    });
    Some(Script {
        argv: start.argv.clone(),
        env: start.env.iter().cloned().chain(trace).collect(),
        work_dir: work_dir.into(),
    })
}

/// The script's stdin, and where its bytes go if it has some.
///
/// # Errors
/// If the kernel gives none.
pub(crate) fn stdin(start: &Start) -> io::Result<(OwnedFd, Option<File>)> {
    if !start.stdin {
        return Ok((File::open("/dev/null")?.into(), None));
    }
    let (read, write) = pipe()?;
    Ok((read.into(), Some(OwnedFd::from(write).into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_a_file_that_python_gets_and_nothing_else() {
        let is_script = |argv: &[&str]| {
            let argv = argv.iter().map(|word| (*word).to_owned().into());
            let start = Start {
                argv: argv.collect(),
                work_dir: "/workspace".into(),
                ..Start::default()
            };
            script_of(&start).is_some()
        };
        assert!(is_script(&["python", "plot.py"]));
        assert!(is_script(&["python", "/workspace/plot.py", "-v"]));
        for other in [
            &["python"][..],
            &["python", ""],
            &["python", "-"],
            &["python", "-c", "1"],
            &["python", "-u", "plot.py"],
            &["python3", "plot.py"],
            &["/usr/bin/python", "plot.py"],
            &["sh", "plot.py"],
            &[],
        ] {
            assert!(!is_script(other), "{other:?}");
        }
    }
}
