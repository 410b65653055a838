//! A call that cannot be recorded does nothing.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt,
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use polydev_tests::{client::shell, folder::Folder, shim::Shim};
use tonic_types::StatusExt;

/// A small disk, while this exists.
struct Disk(Folder);

impl Disk {
    fn mount() -> Self {
        let folder = Folder::new("pdaudit-");
        let (kind, size) = (Some("tmpfs"), Some("size=64k"));
        mount(kind, folder.path(), kind, MsFlags::empty(), size).expect("a tmpfs can be mounted");
        Self(folder)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _left = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_shim_whose_records_have_no_room_does_nothing_until_they_have() {
    let disk = Disk::mount();
    let keys = Folder::new("pdkey-");
    let key = keys.path().join("key");
    fs::write(&key, "5a".repeat(32)).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let log = disk.0.path().join("log").display().to_string();
    let key = key.display().to_string();
    let options = ["--audit-log", &log, "--audit-key-file", &key];
    let shim = Shim::dev_with(&["anthropic=1"], &options);
    let client = shim.client();
    client.run(shell("anthropic", "true")).unwrap();
    client.wait_idle("anthropic", 1);

    let filler = disk.0.path().join("filler");
    let mut file = File::create(&filler).unwrap();
    std::io::copy(&mut std::io::repeat(0), &mut file).unwrap_err();
    // Some records still fit into the last page.
    let refused = (0..50).find_map(|_| {
        client.wait_idle("anthropic", 1);
        client.run(shell("anthropic", "true")).err()
    });
    let refused = refused.expect("the disk is full");
    let info = refused.get_details_error_info();
    assert_eq!(info.unwrap().reason, "AUDIT", "{refused}");
    assert!(refused.message().contains("audit-"), "{refused}");

    drop(file);
    fs::remove_file(filler).unwrap();
    client.run(shell("anthropic", "true")).unwrap();
}
