//! Which host folders a plain task gets. If the plugin's volumes are disabled, nothing
//! outside the allocation's folder, even through symbolic links (CVE-2026-14896), and even
//! if a task exchanges a folder for a link while the container starts.

use std::{
    io,
    path::{Path, PathBuf},
};

use polydev_proto::driver::{Mount as NomadMount, TaskConfig};

use super::{
    folders::{Folders, Held},
    nomads,
    stage::Staged,
};
use crate::config::{Mount, MountKind, Plugin, Task};

/// Why a folder cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "`{field}` is `{given}`: volumes are not enabled (the plugin's `volumes.enabled`); cannot mount paths outside the allocation's folder"
    )]
    VolumesDisabled { field: &'static str, given: String },
    #[error(
        "`{field}` is `{given}`: volumes are not enabled (the plugin's `volumes.enabled`); cannot use Docker volumes"
    )]
    DockerVolume { field: &'static str, given: String },
    #[error("`{field}` is `{given}`: must not show the task's `private` folder beside `broker`")]
    Private { field: &'static str, given: String },
    #[error("`{field}` is `{given}`: cannot open it in the allocation's folder")]
    Unreadable {
        field: &'static str,
        given: String,
        source: io::Error,
    },
    #[error("`load` is `{given}`: must be an image archive in the task's `local` folder")]
    Archive { given: String, source: io::Error },
    #[error("cannot use the allocation's folder `alloc/logs`")]
    Logs { source: io::Error },
    #[error("`{path}` is not the folder that Nomad made")]
    Replaced { path: PathBuf, source: io::Error },
    #[error("cannot mount `{path}`: Docker's short form cannot contain a path with a colon")]
    Colon { path: String },
    #[error("cannot mount `{path}` where Docker can take it from")]
    Stage { path: PathBuf, source: io::Error },
}

/// What is mounted, before anything is held.
#[derive(Debug, Default)]
pub(super) struct Mounts {
    binds: Vec<Bind>,
    /// In Docker's long form. Where there is a folder of the allocation, it is the source.
    mounts: Vec<(Mount, Option<Own>)>,
    /// The task has a key that its command must not read.
    has_private: bool,
    /// What the job's author should know, for the task's events.
    pub(super) notes: Vec<String>,
}

/// A mount in Docker's short form.
#[derive(Debug)]
struct Bind {
    source: Source,
    target: String,
    options: String,
}

#[derive(Debug)]
enum Source {
    /// The operator allows every path.
    Any(PathBuf),
    Own(Own),
}

/// A path that must be in the allocation's folder.
#[derive(Debug, Clone)]
struct Own {
    path: PathBuf,
    /// The job's option; `None` for the folders that Nomad makes.
    given: Option<(&'static str, String)>,
    if_missing: IfMissing,
}

/// What becomes of a source that is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum IfMissing {
    Refused,
    /// The driver creates it, as Docker does for its short form.
    Made,
    /// It was a log, which Nomad removes in time.
    Left,
}

/// The allocation's folders, Nomad's volumes, and what the job requests.
pub(super) fn mounts(task: &TaskConfig, options: &Task, plugin: &Plugin) -> Result<Mounts, Error> {
    let folders = Folders::of(task);
    let label = plugin.selinux_label.as_deref();
    let mut mounts = Mounts {
        has_private: options.broker.is_some(),
        ..Mounts::default()
    };
    let words = |options: &str| {
        let options = options.split(',').chain(label);
        let options: Vec<&str> = options.filter(|word| !word.is_empty()).collect();
        options.join(",")
    };
    // Nomad works in the folder of logs as root. It is for tasks only where jobs may mount any
    // folder anyway.
    let all = nomads::of(task, &folders, plugin.volumes);
    for nomads::Nomads { path, target, kind } in all.map_err(|source| Error::Logs { source })? {
        let own = Own {
            path,
            given: None,
            if_missing: match kind {
                nomads::Kind::Log => IfMissing::Left,
                _ => IfMissing::Refused,
            },
        };
        let (source, options) = match kind {
            nomads::Kind::Closed => (Source::Own(own), words("ro")),
            nomads::Kind::Folder => (Source::Own(own), words("")),
            nomads::Kind::Log => (Source::Own(own), words("ro")),
            nomads::Kind::Fifo => (Source::Any("/dev/null".into()), "ro".into()),
        };
        mounts.binds.push(Bind {
            source,
            target,
            options,
        });
    }
    if let Some(driver) = options.volume_driver.as_ref().filter(|_| !plugin.volumes) {
        return Err(Error::DockerVolume {
            field: "volume_driver",
            given: driver.clone(),
        });
    }
    for volume in &options.volumes {
        let path = match &options.volume_driver {
            // Not a path, but the name of a volume.
            Some(_) => PathBuf::from(&volume.source),
            None => folders.resolve(&volume.source),
        };
        let given = ("volumes", volume.source.clone());
        let source = if plugin.volumes {
            mounts.refuse_private(&folders, &path, Some(&given))?;
            let is_hosts = options.volume_driver.is_none() && !folders.has(&path);
            if is_hosts && path.symlink_metadata().is_err() {
                mounts.notes.push(format!(
                    "`{}` in `volumes` was missing: Docker makes it, as a folder of root",
                    path.display()
                ));
            }
            Source::Any(path)
        } else if Path::new(&volume.source).is_absolute() {
            return Err(volumes_disabled(given));
        } else {
            Source::Own(Own {
                path,
                given: Some(given),
                if_missing: IfMissing::Made,
            })
        };
        mounts.binds.push(Bind {
            source,
            target: volume.target.clone(),
            options: words(&volume.options),
        });
    }
    mounts.mounts.extend(task.mounts.iter().map(nomads));
    for mount in &options.mounts {
        let mut mount = mount.clone();
        let own = match &mut mount.kind {
            MountKind::Bind { source, .. } => {
                let path = folders.resolve(source);
                let given = ("mount.source", source.clone());
                *source = path.to_string_lossy().into_owned();
                if plugin.volumes {
                    mounts.refuse_private(&folders, &path, Some(&given))?;
                    None
                } else {
                    Some(Own {
                        path,
                        given: Some(given),
                        if_missing: IfMissing::Refused,
                    })
                }
            }
            MountKind::Volume { .. } if !plugin.volumes => {
                return Err(Error::DockerVolume {
                    field: "mount.type",
                    given: "volume".into(),
                });
            }
            MountKind::Volume { .. } | MountKind::Tmpfs { .. } => None,
        };
        mounts.mounts.push((mount, own));
    }
    mounts.check(&folders)?;
    Ok(mounts)
}

/// A volume that Nomad has already checked.
fn nomads(volume: &NomadMount) -> (Mount, Option<Own>) {
    let propagation = match &*volume.propagation_mode {
        "host-to-task" => Some("rslave".into()),
        "bidirectional" => Some("rshared".into()),
        _ => None,
    };
    let kind = MountKind::Bind {
        source: volume.host_path.clone(),
        propagation,
    };
    let mount = Mount {
        target: volume.task_path.clone(),
        readonly: volume.readonly,
        kind,
    };
    (mount, None)
}

impl Mounts {
    /// Adds files of the driver.
    pub(super) fn extend(&mut self, files: impl IntoIterator<Item = Mount>) {
        self.mounts
            .extend(files.into_iter().map(|file| (file, None)));
    }

    /// Refuses what could not be mounted now, before an image is downloaded for it.
    fn check(&self, folders: &Folders) -> Result<(), Error> {
        let of_binds = self.binds.iter().filter_map(|bind| match &bind.source {
            Source::Own(own) => Some(own),
            Source::Any(_) => None,
        });
        let of_mounts = self.mounts.iter().filter_map(|(_, own)| own.as_ref());
        for own in of_binds.chain(of_mounts) {
            if own.if_missing == IfMissing::Made {
                let (held, missing) = folders.reach(&own.path).map_err(|why| own.refused(why))?;
                // `join` with an empty path would add a slash.
                let path = match missing.as_os_str().is_empty() {
                    true => held.path,
                    false => held.path.join(missing),
                };
                self.refuse_private(folders, &path, own.given.as_ref())?;
            } else {
                self.hold_if_there(folders, own)?;
            }
        }
        Ok(())
    }

    fn hold(&self, folders: &Folders, own: &Own) -> Result<Held, Error> {
        let held = match own.if_missing {
            IfMissing::Made => folders.make(&own.path),
            IfMissing::Refused | IfMissing::Left => folders.hold(&own.path),
        };
        let held = held.map_err(|why| own.refused(why))?;
        self.refuse_private(folders, &held.path, own.given.as_ref())?;
        Ok(held)
    }

    /// `None` for a log that Nomad has removed meanwhile, or that is a link by now.
    fn hold_if_there(&self, folders: &Folders, own: &Own) -> Result<Option<Held>, Error> {
        if own.if_missing != IfMissing::Left {
            return self.hold(folders, own).map(Some);
        }
        let held = folders.hold(&own.path).ok();
        Ok(held.filter(|held| held.path.file_name() == own.path.file_name()))
    }

    fn refuse_private(
        &self,
        folders: &Folders,
        path: &Path,
        given: Option<&(&'static str, String)>,
    ) -> Result<(), Error> {
        match given {
            Some((field, given)) if self.has_private && folders.shows_private(path) => {
                let given = given.clone();
                Err(Error::Private { field, given })
            }
            _ => Ok(()),
        }
    }

    /// Holds what is of the allocation and mounts it where Docker can take it from. Returns
    /// bind mounts in Docker's short form, and mounts in its long form.
    pub(super) fn stage(
        &self,
        task: &TaskConfig,
        staged: &Staged,
    ) -> Result<(Vec<String>, Vec<Mount>), Error> {
        let folders = Folders::of(task);
        let failed = |path: &Path, source| Error::Stage {
            path: path.to_owned(),
            source,
        };
        let stage = |own: &Own| {
            let held = self.hold_if_there(&folders, own)?;
            let staged = held.map(|held| staged.mount(&held)).transpose();
            staged.map_err(|source| failed(&own.path, source))
        };
        let mut binds = Vec::with_capacity(self.binds.len());
        for bind in &self.binds {
            let source = match &bind.source {
                Source::Any(path) => Some(path.clone()),
                Source::Own(own) => stage(own)?,
            };
            if let Some(source) = source {
                binds.push(bind.short(&source)?);
            }
        }
        let mut mounts = Vec::with_capacity(self.mounts.len());
        for (mount, own) in &self.mounts {
            let mut mount = mount.clone();
            if let (MountKind::Bind { source, .. }, Some(own)) = (&mut mount.kind, own) {
                let staged = stage(own)?;
                *source = staged.unwrap_or_default().to_string_lossy().into_owned();
            }
            mounts.push(mount);
        }
        let closed = staged.close();
        closed.map_err(|source| failed(Path::new("stage"), source))?;
        Ok((binds, mounts))
    }
}

impl Bind {
    fn short(&self, source: &Path) -> Result<String, Error> {
        let source = source.to_string_lossy();
        if source.contains(':') {
            let path = source.into_owned();
            return Err(Error::Colon { path });
        }
        let separator = if self.options.is_empty() { "" } else { ":" };
        Ok(format!(
            "{source}:{}{separator}{}",
            self.target, self.options
        ))
    }
}

impl Own {
    fn refused(&self, source: io::Error) -> Error {
        let path = self.path.clone();
        match self.given.clone() {
            // A task that mounts the parent folder may have replaced the folder with a link.
            None => Error::Replaced { path, source },
            Some(given) if source.kind() == io::ErrorKind::PermissionDenied => {
                volumes_disabled(given)
            }
            Some((field, given)) => Error::Unreadable {
                field,
                given,
                source,
            },
        }
    }
}

fn volumes_disabled((field, given): (&'static str, String)) -> Error {
    Error::VolumesDisabled { field, given }
}

#[cfg(test)]
mod tests;
