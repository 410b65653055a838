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
        "`{field}` is `{given}`: volumes are not enabled; cannot mount paths outside the allocation's folder"
    )]
    VolumesDisabled { field: &'static str, given: String },
    #[error("`{field}` is `{given}`: volumes are not enabled; cannot use Docker volumes")]
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
    /// Whether the driver creates it if it is missing, as Docker does for its short form.
    is_made: bool,
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
    let all = nomads::of(task, &folders).map_err(|source| Error::Logs { source })?;
    for nomads::Nomads { path, target, kind } in all {
        let own = Own {
            path,
            given: None,
            is_made: false,
        };
        let (source, options) = match kind {
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
                is_made: true,
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
                        is_made: false,
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
            if own.is_made {
                let (held, missing) = folders.reach(&own.path).map_err(|why| own.refused(why))?;
                // `join` with an empty path would add a slash.
                let path = match missing.as_os_str().is_empty() {
                    true => held.path,
                    false => held.path.join(missing),
                };
                self.refuse_private(folders, &path, own.given.as_ref())?;
            } else {
                self.hold(folders, own)?;
            }
        }
        Ok(())
    }

    fn hold(&self, folders: &Folders, own: &Own) -> Result<Held, Error> {
        let held = match own.is_made {
            true => folders.make(&own.path),
            false => folders.hold(&own.path),
        };
        let held = held.map_err(|why| own.refused(why))?;
        self.refuse_private(folders, &held.path, own.given.as_ref())?;
        Ok(held)
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
            let held = self.hold(&folders, own)?;
            let staged = staged.mount(&held);
            staged.map_err(|source| failed(&own.path, source))
        };
        let mut binds = Vec::with_capacity(self.binds.len());
        for bind in &self.binds {
            let source = match &bind.source {
                Source::Any(path) => path.clone(),
                Source::Own(own) => stage(own)?,
            };
            binds.push(bind.short(&source)?);
        }
        let mut mounts = Vec::with_capacity(self.mounts.len());
        for (mount, own) in &self.mounts {
            let mut mount = mount.clone();
            if let (MountKind::Bind { source, .. }, Some(own)) = (&mut mount.kind, own) {
                *source = stage(own)?.to_string_lossy().into_owned();
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
mod tests {
    use std::os::unix::fs::symlink;

    use super::{
        super::folders::tests::{Alloc, alloc},
        *,
    };
    use crate::config::Volume;

    fn plugin(volumes: bool) -> Plugin {
        let options = serde_json::json!({"volumes": {"enabled": volumes}});
        Plugin::parse(&rmp_serde::to_vec_named(&options).unwrap()).unwrap()
    }

    /// Where the last volume leads.
    fn with_volume(alloc: &Alloc, source: &str, enabled: bool) -> Result<PathBuf, Error> {
        let options = Task {
            volumes: vec![Volume {
                source: source.into(),
                target: "/x".into(),
                options: String::new(),
            }],
            ..Default::default()
        };
        let mounts = mounts(&alloc.task, &options, &plugin(enabled))?;
        match &mounts.binds.last().unwrap().source {
            Source::Any(path) => Ok(path.clone()),
            Source::Own(own) => Ok(mounts.hold(&Folders::of(&alloc.task), own)?.path),
        }
    }

    fn with_mount(alloc: &Alloc, kind: MountKind, enabled: bool) -> Result<(), Error> {
        let mount = Mount {
            target: "/x".into(),
            readonly: false,
            kind,
        };
        let options = Task {
            mounts: vec![mount],
            ..Default::default()
        };
        mounts(&alloc.task, &options, &plugin(enabled)).map(drop)
    }

    fn bind(source: &str) -> MountKind {
        MountKind::Bind {
            source: source.into(),
            propagation: None,
        }
    }

    /// C092: with volumes disabled, only relative paths that stay in the allocation are
    /// allowed.
    #[test]
    fn host_folders_are_mounted_only_if_the_plugin_enables_volumes() {
        let alloc = alloc();
        for (source, disabled, path) in [
            ("local/data", true, "web/local/data"),
            (".", true, "web"),
            ("../alloc/data", true, "alloc/data"),
            ("/etc", false, "/etc"),
            ("../../../../etc", false, ""),
            ("named", true, "web/named"),
        ] {
            // `join` keeps an absolute path.
            let path = alloc.folder.path().join(path);
            let refused = with_volume(&alloc, source, false);
            assert_eq!(refused.is_ok(), disabled, "{source}: {refused:?}");
            let found = with_volume(&alloc, source, true).unwrap();
            assert!(path == alloc.folder.path() || found == path, "{found:?}");
            assert!(!disabled || refused.unwrap() == path);
        }
        let inside_but_absolute = alloc.folder.path().join("web/local");
        assert!(with_volume(&alloc, &inside_but_absolute.to_string_lossy(), false).is_err());
    }

    #[test]
    fn a_symbolic_link_does_not_lead_out_of_the_allocation() {
        let alloc = alloc();
        let local = alloc.folder.path().join("web/local");
        std::fs::create_dir(alloc.folder.path().join("alloc/data")).unwrap();
        symlink("/etc", local.join("out")).unwrap();
        symlink("/nowhere/yet", local.join("dangling")).unwrap();
        symlink("../../alloc", local.join("shared")).unwrap();
        for (source, allowed) in [
            ("local/out", false),
            ("local/out/ssl", false),
            ("local/dangling", false),
            ("local/shared/data", true),
        ] {
            let volume = with_volume(&alloc, source, false);
            assert_eq!(volume.is_ok(), allowed, "{source}");
            let mount = with_mount(&alloc, bind(source), false);
            assert_eq!(mount.is_ok(), allowed, "{source}");
        }
    }

    /// A task that mounts the parent of its own folder can place links in it.
    #[test]
    fn the_allocations_own_folders_must_still_be_nomads() {
        let alloc = alloc();
        std::fs::remove_dir(alloc.folder.path().join("web/local")).unwrap();
        symlink("/", alloc.folder.path().join("web/local")).unwrap();
        let refused = mounts(&alloc.task, &Task::default(), &plugin(false));
        assert!(
            matches!(refused, Err(Error::Replaced { .. })),
            "{refused:?}"
        );
    }

    /// C093.
    #[test]
    fn mounts_follow_the_same_rule() {
        let alloc = alloc();
        let volume = || MountKind::Volume {
            name: Some("v".into()),
            no_copy: false,
            labels: Default::default(),
            driver: None,
            driver_options: Default::default(),
        };
        assert!(with_mount(&alloc, bind("/etc"), false).is_err());
        assert!(with_mount(&alloc, bind("/etc"), true).is_ok());
        assert!(matches!(
            with_mount(&alloc, volume(), false),
            Err(Error::DockerVolume { .. })
        ));
        assert!(with_mount(&alloc, volume(), true).is_ok());
        let memory = MountKind::Tmpfs {
            size: None,
            mode: None,
        };
        assert!(with_mount(&alloc, memory, false).is_ok());
        // As with Docker, the long form does not create its source.
        let missing = with_mount(&alloc, bind("local/none"), false).unwrap_err();
        assert!(
            matches!(&missing, Error::Unreadable { field: "mount.source", given, .. } if given == "local/none"),
            "{missing:?}"
        );
    }

    #[test]
    fn the_allocations_folders_are_where_nomad_says() {
        let alloc = alloc();
        let mounts = mounts(&alloc.task, &Task::default(), &plugin(false)).unwrap();
        let folders = Folders::of(&alloc.task);
        let short = mounts.binds.iter().map(|bind| match &bind.source {
            Source::Any(path) => panic!("{path:?} is not checked"),
            Source::Own(own) => {
                let held = mounts.hold(&folders, own).unwrap();
                bind.short(&held.path).unwrap()
            }
        });
        let base = &alloc.task.alloc_dir;
        let expected = [
            format!("{base}/alloc:/alloc"),
            format!("{base}/alloc/logs:/alloc/logs"),
            format!("{base}/web/local:/local"),
            format!("{base}/web/secrets:/secrets"),
        ];
        assert!(short.eq(expected));
    }
}
