//! Which host folders a plain task gets. If the plugin's volumes are disabled, nothing
//! outside the allocation's folder, even through symbolic links (CVE-2026-14896).

use std::path::{Component, Path, PathBuf};

use polydev_proto::driver::{Mount as NomadMount, TaskConfig};

use crate::config::{Mount, MountKind, Plugin, Task};

/// Why a folder cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "`{field}` is `{given}`: volumes are not enabled; cannot mount paths outside the allocation's folder"
    )]
    VolumesDisabled { field: &'static str, given: String },
    #[error("`mount.type` is `volume`: volumes are not enabled; cannot use Docker volumes")]
    DockerVolume,
    #[error("`{field}` is `{given}`: must not show the task's `private` folder beside `broker`")]
    Private { field: &'static str, given: String },
    #[error("`load` is `{given}`: must be an image archive in the task's `local` folder")]
    Archive { given: String },
    #[error("`{path}` is not the folder that Nomad made")]
    Replaced { path: PathBuf },
    #[error("cannot mount `{path}`: Docker's short form cannot contain a path with a colon")]
    Colon { path: String },
}

/// Bind mounts in Docker's short form, and mounts in its long form.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Mounts {
    pub(super) binds: Vec<String>,
    pub(super) mounts: Vec<Mount>,
}

/// The allocation's folders, Nomad's volumes, and what the job requests.
pub(super) fn mounts(task: &TaskConfig, options: &Task, plugin: &Plugin) -> Result<Mounts, Error> {
    let folders = Folders::of(task);
    let label = plugin.selinux_label.as_deref();
    let mut binds = Vec::new();
    let mut bind = |source: &Path, target: &str, options: &str| {
        let source = source.to_string_lossy();
        if source.contains(':') {
            return Err(Error::Colon {
                path: source.into_owned(),
            });
        }
        let options: Vec<&str> = options
            .split(',')
            .chain(label)
            .filter(|word| !word.is_empty())
            .collect();
        let separator = if options.is_empty() { "" } else { ":" };
        binds.push(format!("{source}:{target}{separator}{}", options.join(",")));
        Ok(())
    };
    let inside = |variable: &str, default: &str| -> String {
        let value = task.env.get(variable).filter(|value| !value.is_empty());
        value.cloned().unwrap_or_else(|| default.into())
    };
    let shared = inside("NOMAD_ALLOC_DIR", "/alloc");
    // The FIFOs to Nomad are in `logs`; only init may write to them.
    for (source, target, options) in [
        (&folders.shared, shared.clone(), ""),
        (&folders.shared.join("logs"), format!("{shared}/logs"), "ro"),
        (&folders.local, inside("NOMAD_TASK_DIR", "/local"), ""),
        (
            &folders.secrets,
            inside("NOMAD_SECRETS_DIR", "/secrets"),
            "",
        ),
    ] {
        // A task that mounts the parent folder may have replaced the folder with a link.
        let source = folders.hold(source).ok_or_else(|| Error::Replaced {
            path: source.clone(),
        })?;
        bind(&source, &target, options)?;
    }
    let refuse_private = |field, source: &Path, given: &str| {
        if options.broker.is_some() && folders.shows_private(source) {
            let given = given.to_owned();
            return Err(Error::Private { field, given });
        }
        Ok(())
    };
    for volume in &options.volumes {
        let is_relative = Path::new(&volume.source).is_relative();
        let mut source = folders.resolve(&volume.source);
        if !plugin.volumes {
            let held = folders.hold(&source).filter(|_| is_relative);
            source = held.ok_or_else(|| Error::VolumesDisabled {
                field: "volumes",
                given: volume.source.clone(),
            })?;
        }
        refuse_private("volumes", &source, &volume.source)?;
        bind(&source, &volume.target, &volume.options)?;
    }
    let mut mounts = Vec::new();
    for NomadMount {
        task_path,
        host_path,
        readonly,
        propagation_mode,
        ..
    } in &task.mounts
    {
        let propagation = match &**propagation_mode {
            "host-to-task" => Some("rslave".into()),
            "bidirectional" => Some("rshared".into()),
            _ => None,
        };
        mounts.push(Mount {
            target: task_path.clone(),
            readonly: *readonly,
            kind: MountKind::Bind {
                source: host_path.clone(),
                propagation,
            },
        });
    }
    for mount in &options.mounts {
        let mut mount = mount.clone();
        match &mut mount.kind {
            MountKind::Bind { source, .. } => {
                let mut path = folders.resolve(source);
                if !plugin.volumes {
                    path = folders.hold(&path).ok_or_else(|| Error::VolumesDisabled {
                        field: "mount.source",
                        given: source.clone(),
                    })?;
                }
                refuse_private("mount.source", &path, source)?;
                *source = path.to_string_lossy().into_owned();
            }
            MountKind::Volume { .. } if !plugin.volumes => return Err(Error::DockerVolume),
            MountKind::Volume { .. } | MountKind::Tmpfs { .. } => {}
        }
        mounts.push(mount);
    }
    Ok(Mounts { binds, mounts })
}

/// The folders of an allocation on the host.
#[derive(Debug)]
pub(super) struct Folders {
    alloc: PathBuf,
    shared: PathBuf,
    pub(super) task: PathBuf,
    pub(super) local: PathBuf,
    secrets: PathBuf,
}

impl Folders {
    pub(super) fn of(task: &TaskConfig) -> Self {
        let alloc = PathBuf::from(&task.alloc_dir);
        let own = alloc.join(&task.name);
        Self {
            shared: alloc.join("alloc"),
            local: own.join("local"),
            secrets: own.join("secrets"),
            task: own,
            alloc,
        }
    }

    /// Keeps an absolute path, resolves others below the task's folder, and removes `..`.
    fn resolve(&self, source: &str) -> PathBuf {
        let mut path = PathBuf::new();
        for component in self.task.join(source).components() {
            match component {
                Component::ParentDir => drop(path.pop()),
                Component::CurDir => {}
                other => path.push(other),
            }
        }
        path
    }

    /// The target of a path with links resolved, if it is in the allocation's folder. For a
    /// missing path, the folder in which it would be created counts.
    fn hold(&self, path: &Path) -> Option<PathBuf> {
        let alloc = self.alloc.canonicalize().ok()?;
        // A dangling link exists, and its target would be created.
        let existing = path
            .ancestors()
            .find(|ancestor| ancestor.symlink_metadata().is_ok())?;
        let missing = path.strip_prefix(existing).ok()?;
        let held = existing.canonicalize().ok()?;
        let is_inside = path.starts_with(&self.alloc) && held.starts_with(alloc);
        // `join` with an empty path would add a slash.
        let held = if missing.as_os_str().is_empty() {
            held
        } else {
            held.join(missing)
        };
        is_inside.then_some(held)
    }

    /// A file in the task's `private` folder, by its path below the task's folder.
    pub(super) fn private(&self, given: &str) -> Option<PathBuf> {
        let private = self.task.join("private").canonicalize().ok()?;
        let held = self.hold(&self.task.join(given))?;
        (held.starts_with(private) && held.is_file()).then_some(held)
    }

    /// Whether a mount of the path would show the task's `private` folder.
    fn shows_private(&self, path: &Path) -> bool {
        let private = self.task.join("private");
        let held = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let (path, private) = (held(path), held(&private));
        private.starts_with(&path) || path.starts_with(&private)
    }

    /// An image archive in the task's `local` folder.
    pub(super) fn archive(&self, given: &str) -> Result<PathBuf, Error> {
        let path = self.local.join(given);
        let held = self.hold(&path).filter(|held| held.is_file());
        held.filter(|_| {
            Path::new(given)
                .components()
                .all(|part| matches!(part, Component::Normal(_)))
        })
        .ok_or_else(|| Error::Archive {
            given: given.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Volume;
    use std::os::unix::fs::symlink;

    struct Alloc {
        folder: tempfile::TempDir,
        task: TaskConfig,
    }

    fn alloc() -> Alloc {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("alloc/logs")).unwrap();
        for own in ["web/local", "web/secrets"] {
            std::fs::create_dir_all(folder.path().join(own)).unwrap();
        }
        let task = TaskConfig {
            name: "web".into(),
            alloc_dir: folder.path().to_string_lossy().into_owned(),
            ..Default::default()
        };
        Alloc { folder, task }
    }

    fn plugin(volumes: bool) -> Plugin {
        let options = serde_json::json!({"volumes": {"enabled": volumes}});
        Plugin::parse(&rmp_serde::to_vec_named(&options).unwrap()).unwrap()
    }

    fn with_volume(alloc: &Alloc, source: &str, enabled: bool) -> Result<String, Error> {
        let options = Task {
            volumes: vec![Volume {
                source: source.into(),
                target: "/x".into(),
                options: String::new(),
            }],
            ..Default::default()
        };
        let mounts = mounts(&alloc.task, &options, &plugin(enabled))?;
        Ok(mounts.binds.last().unwrap().clone())
    }

    fn with_mount(alloc: &Alloc, kind: MountKind, enabled: bool) -> Result<Mount, Error> {
        let mount = Mount {
            target: "/x".into(),
            readonly: false,
            kind,
        };
        let options = Task {
            mounts: vec![mount],
            ..Default::default()
        };
        let mounts = mounts(&alloc.task, &options, &plugin(enabled))?;
        Ok(mounts.mounts.last().unwrap().clone())
    }

    /// C092: with volumes disabled, only relative paths that stay in the allocation are
    /// allowed.
    #[test]
    fn host_folders_are_mounted_only_if_the_plugin_enables_volumes() {
        let alloc = alloc();
        let path = |below: &str| format!("{}/{below}:/x", alloc.task.alloc_dir);
        for (source, disabled, enabled) in [
            ("local/data", true, path("web/local/data")),
            (".", true, path("web")),
            ("../alloc/data", true, path("alloc/data")),
            ("/etc", false, "/etc:/x".into()),
            ("../../../../etc", false, String::new()),
            ("named", true, path("web/named")),
        ] {
            let refused = with_volume(&alloc, source, false);
            assert_eq!(refused.is_ok(), disabled, "{source}: {refused:?}");
            let bind = with_volume(&alloc, source, true).unwrap();
            assert!(enabled.is_empty() || bind == enabled, "{source}: {bind}");
        }
        let inside_but_absolute = alloc.folder.path().join("web/local");
        assert!(with_volume(&alloc, &inside_but_absolute.to_string_lossy(), false).is_err());
    }

    #[test]
    fn a_symbolic_link_does_not_lead_out_of_the_allocation() {
        let alloc = alloc();
        let local = alloc.folder.path().join("web/local");
        symlink("/etc", local.join("out")).unwrap();
        symlink("/nowhere/yet", local.join("dangling")).unwrap();
        symlink("../../alloc", local.join("shared")).unwrap();
        for (source, allowed) in [
            ("local/out", false),
            ("local/out/ssl", false),
            ("local/dangling", false),
            ("local/shared/data", true),
        ] {
            assert_eq!(
                with_volume(&alloc, source, false).is_ok(),
                allowed,
                "{source}"
            );
            let kind = MountKind::Bind {
                source: source.into(),
                propagation: None,
            };
            assert_eq!(with_mount(&alloc, kind, false).is_ok(), allowed, "{source}");
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

    /// C005: an image archive must be in the task's `local` folder.
    #[test]
    fn an_image_archive_is_a_file_of_the_tasks_own() {
        let alloc = alloc();
        let folders = Folders::of(&alloc.task);
        std::fs::write(folders.local.join("image.tar"), "").unwrap();
        symlink("/etc/passwd", folders.local.join("link")).unwrap();
        assert!(folders.archive("image.tar").is_ok());
        for wrong in ["none.tar", "/etc/passwd", "../local/image.tar", "link", "."] {
            assert!(folders.archive(wrong).is_err(), "{wrong}");
        }
    }

    /// C093.
    #[test]
    fn mounts_follow_the_same_rule() {
        let alloc = alloc();
        let bind = |source: &str| MountKind::Bind {
            source: source.into(),
            propagation: None,
        };
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
            Err(Error::DockerVolume)
        ));
        assert!(with_mount(&alloc, volume(), true).is_ok());
        assert!(
            with_mount(
                &alloc,
                MountKind::Tmpfs {
                    size: None,
                    mode: None
                },
                false
            )
            .is_ok()
        );
    }

    #[test]
    fn the_allocations_folders_are_where_nomad_says() {
        let alloc = alloc();
        let mounts = mounts(&alloc.task, &Task::default(), &plugin(false)).unwrap();
        let base = &alloc.task.alloc_dir;
        let expected = [
            format!("{base}/alloc:/alloc"),
            format!("{base}/alloc/logs:/alloc/logs:ro"),
            format!("{base}/web/local:/local"),
            format!("{base}/web/secrets:/secrets"),
        ];
        assert_eq!(mounts.binds, expected);
    }
}
