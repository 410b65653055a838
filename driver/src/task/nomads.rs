//! The folders that Nomad makes for a task. In `alloc/logs`, which all tasks of the group share,
//! a task may make files of its own; what Nomad has there is covered.

use std::{fs, io, os::unix::fs::FileTypeExt, path::PathBuf};

use polydev_proto::driver::TaskConfig;

use super::folders::Folders;

/// What Nomad has in `alloc/logs` at most: more of it are not Nomad's.
const MAX_COVERED: usize = 1000;

/// A folder or file of Nomad's, and where the task sees it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Nomads {
    pub(super) path: PathBuf,
    pub(super) target: String,
    pub(super) kind: Kind,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The task writes there.
    Folder,
    /// A log that Nomad writes; tasks read it.
    Log,
    /// A way to Nomad's log, which init alone uses.
    Fifo,
}

/// # Errors
/// If `alloc/logs` cannot be read, or a task has filled it with what looks like Nomad's.
pub(super) fn of(task: &TaskConfig, folders: &Folders) -> io::Result<Vec<Nomads>> {
    let inside = |variable: &str, default: &str| -> String {
        let value = task.env.get(variable).filter(|value| !value.is_empty());
        value.cloned().unwrap_or_else(|| default.into())
    };
    let shared = inside("NOMAD_ALLOC_DIR", "/alloc");
    let (logs, inside_logs) = (folders.shared.join("logs"), format!("{shared}/logs"));
    let local = inside("NOMAD_TASK_DIR", "/local");
    let secrets = inside("NOMAD_SECRETS_DIR", "/secrets");
    let mut all: Vec<Nomads> = [
        (folders.shared.clone(), shared),
        // As a mount it can be neither renamed nor removed.
        (logs.clone(), inside_logs.clone()),
        (folders.local.clone(), local),
        (folders.secrets.clone(), secrets),
    ]
    .into_iter()
    .map(|(path, target)| Nomads {
        path,
        target,
        kind: Kind::Folder,
    })
    .collect();
    let plain = all.len();
    for entry in fs::read_dir(&logs)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let kind = entry.file_type()?;
        let (task, kind) = match (fifo_of(&name), log_of(&name)) {
            (Some(task), _) if kind.is_fifo() => (task, Kind::Fifo),
            (_, Some(task)) if kind.is_file() => (task, Kind::Log),
            _ => continue,
        };
        if folders.has_task(task) {
            let (path, target) = (logs.join(&name), format!("{inside_logs}/{name}"));
            all.push(Nomads { path, target, kind });
        }
    }
    if all.len() - plain > MAX_COVERED {
        return Err(io::Error::other(format!(
            "it has more than {MAX_COVERED} files with names of Nomad's logs"
        )));
    }
    // The order of a folder is by chance.
    all[plain..].sort_by(|a, b| a.path.cmp(&b.path));
    Ok(all)
}

/// The task whose output `.TASK.stdout.fifo` takes.
fn fifo_of(name: &str) -> Option<&str> {
    stream_of(name.strip_prefix('.')?.strip_suffix(".fifo")?)
}

/// The task whose log is `TASK.stdout.0`.
fn log_of(name: &str) -> Option<&str> {
    let (stream, number) = name.rsplit_once('.')?;
    number.parse::<u32>().ok()?;
    stream_of(stream)
}

fn stream_of(name: &str) -> Option<&str> {
    name.strip_suffix(".stdout")
        .or_else(|| name.strip_suffix(".stderr"))
}

#[cfg(test)]
mod tests {
    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::{super::folders::tests::alloc, *};

    #[test]
    fn what_nomad_has_in_the_logs_is_covered_and_nothing_else() {
        let alloc = alloc();
        let folders = Folders::of(&alloc.task);
        let logs = folders.shared.join("logs");
        for fifo in [".web.stdout.fifo", ".other.stdout.fifo", "own.fifo"] {
            mkfifo(&logs.join(fifo), Mode::S_IRWXU).unwrap();
        }
        for file in ["web.stderr.12", "web.stdout.x", "other.stdout.0", "app.log"] {
            fs::write(logs.join(file), "").unwrap();
        }
        // A link is not Nomad's.
        std::os::unix::fs::symlink("/etc/passwd", logs.join("web.stdout.3")).unwrap();

        let all = of(&alloc.task, &folders).unwrap();
        let covered: Vec<(&str, &Kind)> = all[4..]
            .iter()
            .map(|one| (&*one.target, &one.kind))
            .collect();
        assert_eq!(
            covered,
            [
                ("/alloc/logs/.web.stdout.fifo", &Kind::Fifo),
                ("/alloc/logs/web.stderr.12", &Kind::Log),
            ]
        );
        let folders: Vec<&str> = all[..4].iter().map(|one| &*one.target).collect();
        assert_eq!(folders, ["/alloc", "/alloc/logs", "/local", "/secrets"]);
    }
}
