//! The files in the state folder that containers use.

use std::{
    fs::{self, File, Permissions},
    io,
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

/// A file that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the program `{path}` given in `init_path`")]
    Init { path: PathBuf, source: io::Error },
    #[error("cannot write `{path}`")]
    Write { path: PathBuf, source: io::Error },
}

/// The folder's random id, created at first use.
///
/// # Errors
/// [`Error::Write`]
pub fn instance(state_dir: &Path) -> Result<String, Error> {
    let path = state_dir.join("instance");
    if let Ok(id) = fs::read_to_string(&path)
        && id.len() == 8
        && id.bytes().all(|byte| byte.is_ascii_hexdigit())
    {
        return Ok(id);
    }
    let id = format!("{:08x}", rand::random::<u32>());
    write(&path, id.as_bytes(), 0o600)?;
    Ok(id)
}

/// A random UUID for this machine and folder, created at first use. A copy of the folder on another
/// machine gets another one.
///
/// # Errors
/// [`Error::Write`]
pub fn node_identity(state_dir: &Path, machine_id: &Path) -> Result<String, Error> {
    let path = state_dir.join("identity");
    // Without such an id all machines look alike.
    let machine = fs::read(machine_id).unwrap_or_default();
    let machine = hex::encode(&Sha256::digest(&machine)[..16]);
    if let Ok(known) = fs::read_to_string(&path)
        && let Some((identity, of)) = known.trim_end().split_once(' ')
        && of == machine
    {
        return Ok(identity.to_owned());
    }
    let identity = uuid::Uuid::new_v4().to_string();
    write(&path, format!("{identity} {machine}\n").as_bytes(), 0o600)?;
    Ok(identity)
}

/// Copies init to a name that is derived from its content, so that containers that have
/// mounted it outlive an upgrade.
///
/// # Errors
/// [`Error`]
pub fn install_init(source: &Path, state_dir: &Path) -> Result<PathBuf, Error> {
    let init = fs::read(source).map_err(|error| Error::Init {
        path: source.to_owned(),
        source: error,
    })?;
    let digest = hex::encode(&Sha256::digest(&init)[..8]);
    let path = state_dir.join(format!("init-{digest}"));
    if !path.exists() {
        write(&path, &init, 0o755)?;
    }
    Ok(path)
}

/// The content of the containers' resolv.conf now, because names must resolve without dockerd's own
/// resolver. Containers cannot reach name servers on the host's loopback. In that case the file
/// behind the local resolver counts. Empty if containers can reach none.
#[must_use]
pub fn resolv_conf() -> String {
    let sources = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
    let reachable = sources
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .map(|text| without_loopback(&text))
        .find(|text| text.contains("nameserver"));
    reachable.unwrap_or_default()
}

/// Writes the containers' resolv.conf into the file that they have mounted, so that they see it at
/// once: a file in its place would be another one.
///
/// # Errors
/// [`Error::Write`]
pub fn write_resolv_conf(path: &Path, text: &str) -> Result<(), Error> {
    if !text.contains("nameserver") {
        tracing::warn!("containers cannot reach any name server of this host");
    }
    let write = || {
        let mut options = File::options();
        let file = options
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        file.set_permissions(Permissions::from_mode(0o644))?;
        file.write_all_at(text.as_bytes(), 0)?;
        file.set_len(text.len() as u64)
    };
    write().map_err(|source| Error::Write {
        path: path.to_owned(),
        source,
    })
}

/// Creates a folder, or empties it of what an earlier life of the driver left, except for
/// what is still `in_use`.
///
/// # Errors
/// [`Error::Write`]
pub fn folder_of(path: &Path, in_use: &[PathBuf]) -> Result<PathBuf, Error> {
    let wrong = |source| Error::Write {
        path: path.to_owned(),
        source,
    };
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made.map_err(wrong)?,
    }
    for entry in fs::read_dir(path).map_err(wrong)?.flatten() {
        if !in_use.contains(&entry.path()) {
            fs::remove_dir_all(entry.path()).map_err(wrong)?;
        }
    }
    Ok(path.to_owned())
}

fn without_loopback(text: &str) -> String {
    let reachable = |line: &&str| {
        let server = line.strip_prefix("nameserver").map(str::trim);
        server.is_none_or(|address| {
            address
                .parse::<std::net::IpAddr>()
                .is_ok_and(|address| !address.is_loopback())
        })
    };
    text.lines()
        .filter(reachable)
        .flat_map(|line| [line, "\n"])
        .collect()
}

/// Writes all or nothing, because another process may map or read the file at any time.
pub(crate) fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), Error> {
    let partial = path.with_extension("partial");
    fs::write(&partial, content)
        .and_then(|()| fs::set_permissions(&partial, Permissions::from_mode(mode)))
        .and_then(|()| fs::rename(&partial, path))
        .map_err(|source| Error::Write {
            path: path.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_the_file_open_reads_the_new_name_servers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        write_resolv_conf(&path, "nameserver 192.0.2.1\nsearch example.org\n").unwrap();
        let open = File::open(&path).unwrap();
        for text in [
            "nameserver 192.0.2.2\n",
            "nameserver 192.0.2.3\nnameserver 192.0.2.4\n",
        ] {
            write_resolv_conf(&path, text).unwrap();
            let mut read = vec![0; 100];
            let length = open.read_at(&mut read, 0).unwrap();
            assert_eq!(read[..length], *text.as_bytes());
        }
    }

    #[test]
    fn a_node_keeps_its_identity_and_a_copy_has_another() {
        let folder = tempfile::tempdir().unwrap();
        let machine = folder.path().join("machine-id");
        fs::write(&machine, "0123\n").unwrap();
        let identity = || node_identity(folder.path(), &machine).unwrap();
        let first = identity();
        assert_eq!(identity(), first);
        fs::write(&machine, "4567\n").unwrap();
        let second = identity();
        assert_ne!(second, first);
        fs::write(folder.path().join("identity"), "").unwrap();
        assert!(![first, second].contains(&identity()));
    }

    #[test]
    fn name_servers_of_the_hosts_loopback_are_left_out() {
        let text =
            "search example.org\nnameserver 127.0.0.53\nnameserver 10.0.0.2\noptions edns0\n";
        let expected = "search example.org\nnameserver 10.0.0.2\noptions edns0\n";
        assert_eq!(without_loopback(text), expected);
    }

    #[test]
    fn an_upgraded_init_gets_another_name() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("init");
        fs::write(&source, "one").unwrap();
        let first = install_init(&source, folder.path()).unwrap();
        fs::write(&source, "two").unwrap();
        let second = install_init(&source, folder.path()).unwrap();
        assert_ne!(first, second);
        assert_eq!(fs::read_to_string(first).unwrap(), "one");
        assert!(install_init(&folder.path().join("none"), folder.path()).is_err());
    }

    #[test]
    fn an_instance_keeps_its_id() {
        let folder = tempfile::tempdir().unwrap();
        let id = instance(folder.path()).unwrap();
        assert_eq!(instance(folder.path()).unwrap(), id);
    }
}
