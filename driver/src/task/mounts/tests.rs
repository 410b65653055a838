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
        format!("{base}/alloc/logs:/alloc/logs:ro"),
        format!("{base}/web/local:/local"),
        format!("{base}/web/secrets:/secrets"),
    ];
    assert!(short.eq(expected));
}
