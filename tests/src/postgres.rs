//! A PostgreSQL server for one test, on loopback, with TLS and a password.

use std::{
    fs,
    net::TcpListener,
    os::unix::{fs::chown, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::{sys::signal::Signal, unistd::User};

use crate::{
    folder::Folder,
    fresh_key,
    process::{Process, output, succeed},
    tls::Certificates,
    wait_until,
};

/// The database and its owner.
const NAME: &str = "polydev";

/// Dropping the server stops it and removes its data.
#[derive(Debug)]
pub struct Postgres {
    process: Option<Process>,
    port: u16,
    /// The password of the owner.
    pub password: String,
    authority: PathBuf,
    folder: Folder,
    _certificates: Certificates,
}

impl Postgres {
    /// # Panics
    /// Without root's rights, or if the server does not start.
    #[must_use]
    pub fn start() -> Self {
        let (folder, certificates) = (Folder::new("pdpg-"), Certificates::make());
        let user = postgres();
        let give = |path: &Path| {
            let (uid, gid) = (user.uid.as_raw(), user.gid.as_raw());
            chown(path, Some(uid), Some(gid)).expect("root may");
        };
        give(folder.path());
        let data = folder.path().join("data");
        succeed(
            as_postgres("initdb")
                .args(["--auth=trust", "--no-sync", "-D"])
                .arg(&data),
        );
        let write = |name: &str, text: &str| {
            let path = data.join(name);
            fs::write(&path, text).expect("a file can be written");
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            fs::set_permissions(&path, mode).expect("root may");
            give(&path);
        };
        let [certificate, key] = certificates.server();
        write("server.crt", &certificate);
        write("server.key", &key);
        write(
            "pg_hba.conf",
            "local all postgres trust\nhostssl all polydev 127.0.0.1/32 scram-sha-256\n",
        );
        let free = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
        let mut postgres = Self {
            process: None,
            port: free.expect("a port is free").port(),
            password: fresh_key(),
            authority: certificates.authority(),
            folder,
            _certificates: certificates,
        };
        postgres.begin();
        postgres.sql("postgres", "CREATE ROLE polydev LOGIN");
        let password = format!("ALTER ROLE polydev PASSWORD '{}'", postgres.password);
        postgres.sql("postgres", &password);
        postgres.sql("postgres", "CREATE DATABASE polydev OWNER polydev");
        postgres
    }

    /// Starts the server again.
    ///
    /// # Panics
    /// If the server does not start.
    pub fn begin(&mut self) {
        let mut command = as_postgres("postgres");
        command.arg("-D").arg(self.folder.path().join("data"));
        command
            .args(["-p", &self.port.to_string(), "-k"])
            .arg(self.folder.path());
        for setting in ["listen_addresses=127.0.0.1", "ssl=on", "fsync=off"] {
            command.args(["-c", setting]);
        }
        self.process = Some(Process::start(
            &mut command,
            &self.folder.path().join("log"),
        ));
        wait_until("PostgreSQL", Duration::from_secs(30), || {
            let ready = output(&mut self.psql("postgres", "SELECT 1"));
            match ready.status.success() {
                true => Ok(()),
                false => Err(String::from_utf8_lossy(&ready.stderr).into_owned()),
            }
        });
    }

    /// Stops the server and breaks its connections.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.end(Signal::SIGINT);
        }
    }

    /// The URL for a shim, without the password, which the shim gets separately.
    #[must_use]
    pub fn url(&self) -> String {
        format!(
            "postgres://{NAME}@127.0.0.1:{}/{NAME}?sslmode=verify-full&sslrootcert={}",
            self.port,
            self.authority.display()
        )
    }

    /// Runs a statement in the database as its superuser, and returns the rows.
    ///
    /// # Panics
    /// If the statement fails.
    pub fn sql(&self, database: &str, statement: &str) -> String {
        succeed(&mut self.psql(database, statement))
    }

    fn psql(&self, database: &str, statement: &str) -> Command {
        let mut command = as_postgres("psql");
        command.arg("-h").arg(self.folder.path());
        command.args([
            "-p",
            &self.port.to_string(),
            "-U",
            "postgres",
            "-d",
            database,
        ]);
        command.args(["--tuples-only", "--no-align", "-c", statement]);
        command
    }

    /// The folder of the server's files.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop();
    }
}

fn postgres() -> User {
    let user = User::from_name("postgres").expect("users can be looked up");
    user.expect("PostgreSQL has its user")
}

/// A command for one of PostgreSQL's programs, which do not run as root.
fn as_postgres(program: &str) -> Command {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed");
    let found = versions
        .filter_map(Result::ok)
        .map(|version| version.path().join("bin").join(program))
        .find(|path| path.exists());
    let mut command = Command::new(found.expect("PostgreSQL has its programs"));
    let user = postgres();
    command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    command.current_dir("/").env_remove("PGPASSWORD");
    command
}
