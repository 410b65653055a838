//! The ledger of runs that ran: a server outside the nodes. It writes each received id into a
//! file before it answers.

use std::{
    collections::HashMap,
    fs::{self, OpenOptions},
    io::{self, BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    thread,
    time::Duration,
};

use polydev_tests::{cluster::Cluster, folder::Folder, process::Process, program, wait_until};

const PORT: u16 = 80;
/// How long the ledger waits for a silent command.
const SILENCE: Duration = Duration::from_secs(10);
/// Of an id.
const MAX_LINE: u64 = 100;

/// Dropping the ledger ends its server.
pub(crate) struct Ledger {
    pub(crate) address: SocketAddr,
    folder: Folder,
    _process: Process,
}

impl Ledger {
    /// # Panics
    /// If the server does not start.
    pub(crate) fn start(cluster: &Cluster) -> Self {
        let folder = Folder::new("pdtest-");
        let file = folder.path().join("ledger");
        let (namespace, address) = cluster.outside();
        let address = SocketAddr::new(address, PORT);
        let mut command = namespace.inside();
        command.arg(program("chaos")).arg("ledger");
        command.arg(address.to_string()).arg(&file);
        let process = Process::start(&mut command, &folder.path().join("log"));
        wait_until("the ledger", Duration::from_secs(10), || {
            fs::metadata(&file)
                .map(drop)
                .map_err(|error| error.to_string())
        });
        Self {
            address,
            folder,
            _process: process,
        }
    }

    /// How often each id was written.
    pub(crate) fn entries(&self) -> io::Result<HashMap<String, u32>> {
        let mut entries = HashMap::new();
        for id in fs::read_to_string(self.folder.path().join("ledger"))?.lines() {
            *entries.entry(id.to_owned()).or_default() += 1;
        }
        Ok(entries)
    }
}

/// Serves forever.
pub(crate) fn serve(listen: SocketAddr, file: &Path) -> io::Result<()> {
    let listener = TcpListener::bind(listen)?;
    let file = OpenOptions::new().create(true).append(true).open(file)?;
    let file = Arc::new(file);
    for connection in listener.incoming() {
        let (connection, file) = (connection?, file.clone());
        thread::spawn(move || write_down(&connection, &file));
    }
    Ok(())
}

fn write_down(connection: &TcpStream, mut file: &fs::File) -> io::Result<()> {
    connection.set_read_timeout(Some(SILENCE))?;
    let mut line = String::new();
    let mut reader = BufReader::new(io::Read::take(connection, MAX_LINE));
    reader.read_line(&mut line)?;
    if line.ends_with('\n') {
        // One write appends the whole line.
        file.write_all(line.as_bytes())?;
        (&mut &*connection).write_all(b"written\n")?;
    }
    Ok(())
}
