//! The folders that Nomad makes for a task. In `alloc/logs`, which all tasks of the group share,
//! a task may make files of its own if the operator trusts jobs with the host's folders; what
//! Nomad has there is covered.

use std::{fs, io, os::unix::fs::FileTypeExt, path::PathBuf};

use polydev_proto::driver::TaskConfig;

use super::folders::Folders;

/// Most logs of Nomad's that are covered, the newest first: each is a mount.
const MAX_LOGS: usize = 100;

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
    /// The task reads there.
    Closed,
    /// A log that Nomad writes; tasks read it.
    Log,
    /// A way to Nomad's log, which init alone uses.
    Fifo,
}

/// # Errors
/// If `alloc/logs` cannot be read.
pub(super) fn of(
    task: &TaskConfig,
    folders: &Folders,
    may_write_logs: bool,
) -> io::Result<Vec<Nomads>> {
    let inside = |variable: &str, default: &str| -> String {
        let value = task.env.get(variable).filter(|value| !value.is_empty());
        value.cloned().unwrap_or_else(|| default.into())
    };
    let shared = inside("NOMAD_ALLOC_DIR", "/alloc");
    let (logs, inside_logs) = (folders.shared.join("logs"), format!("{shared}/logs"));
    let local = inside("NOMAD_TASK_DIR", "/local");
    let secrets = inside("NOMAD_SECRETS_DIR", "/secrets");
    let logs_kind = match may_write_logs {
        true => Kind::Folder,
        false => Kind::Closed,
    };
    let mut all: Vec<Nomads> = [
        (folders.shared.clone(), shared, Kind::Folder),
        // As a mount it can be neither renamed nor removed.
        (logs.clone(), inside_logs.clone(), logs_kind),
        (folders.local.clone(), local, Kind::Folder),
        (folders.secrets.clone(), secrets, Kind::Folder),
    ]
    .into_iter()
    .map(|(path, target, kind)| Nomads { path, target, kind })
    .collect();
    if !may_write_logs {
        return Ok(all);
    }
    let (mut fifos, mut files) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(&logs)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let kind = entry.file_type()?;
        if kind.is_fifo() && fifo_of(&name).is_some_and(|task| folders.has_task(task)) {
            fifos.push(name);
        } else if let Some((task, number)) = log_of(&name)
            && kind.is_file()
            && folders.has_task(task)
        {
            files.push((number, name));
        }
    }
    files.sort_by(|a, b| b.cmp(a));
    files.truncate(MAX_LOGS);
    let covered = |kind: fn() -> Kind| {
        let (logs, inside_logs) = (&logs, &inside_logs);
        move |name: String| Nomads {
            path: logs.join(&name),
            target: format!("{inside_logs}/{name}"),
            kind: kind(),
        }
    };
    all.extend(fifos.into_iter().map(covered(|| Kind::Fifo)));
    let files = files.into_iter().map(|(_, name)| name);
    all.extend(files.map(covered(|| Kind::Log)));
    Ok(all)
}

/// The task whose output `.TASK.stdout.fifo` takes.
fn fifo_of(name: &str) -> Option<&str> {
    stream_of(name.strip_prefix('.')?.strip_suffix(".fifo")?)
}

/// The task whose log is `TASK.stdout.0`, and the number.
fn log_of(name: &str) -> Option<(&str, u32)> {
    let (stream, number) = name.rsplit_once('.')?;
    Some((stream_of(stream)?, number.parse().ok()?))
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

        let all = of(&alloc.task, &folders, true).unwrap();
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
        let closed = of(&alloc.task, &folders, false).unwrap();
        assert_eq!((closed.len(), &closed[1].kind), (4, &Kind::Closed));
        let folders: Vec<&str> = all[..4].iter().map(|one| &*one.target).collect();
        assert_eq!(folders, ["/alloc", "/alloc/logs", "/local", "/secrets"]);
    }
}
