//! Between a driver and dockerd: sees what is asked, and can act in the middle of it.

use std::{
    fmt,
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use tempfile::TempDir;

type Matches = Box<dyn Fn(&str) -> bool + Send>;
type Action = Box<dyn FnOnce() + Send>;

/// A socket like dockerd's. It ends with the process.
#[derive(Debug)]
pub struct DockerProxy {
    folder: TempDir,
    shared: Arc<Shared>,
}

struct Shared {
    docker: PathBuf,
    seen: Mutex<Vec<String>>,
    /// A request to come, and what to do when it was passed on.
    next: Mutex<Option<(Matches, Action)>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("docker", &self.docker)
            .finish_non_exhaustive()
    }
}

impl DockerProxy {
    /// Stands before the dockerd of this socket.
    ///
    /// # Panics
    /// If no socket can be made.
    #[must_use]
    pub fn start(docker: &Path) -> Self {
        let proxy = Self {
            folder: tempfile::tempdir().expect("a folder can be made"),
            shared: Arc::new(Shared {
                docker: docker.to_owned(),
                seen: Mutex::default(),
                next: Mutex::default(),
            }),
        };
        let listener = UnixListener::bind(proxy.socket()).expect("a socket can be made");
        let shared = proxy.shared.clone();
        thread::spawn(move || {
            for driver in listener.incoming().flatten() {
                let shared = shared.clone();
                thread::spawn(move || serve(driver, &shared));
            }
        });
        proxy
    }

    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("docker.sock")
    }

    /// Method and path of each request since the last call.
    #[must_use]
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.shared.seen))
    }

    /// Once: acts as soon as such a request (its method and path) has reached dockerd.
    pub fn on(
        &self,
        request: impl Fn(&str) -> bool + Send + 'static,
        action: impl FnOnce() + Send + 'static,
    ) {
        *lock(&self.shared.next) = Some((Box::new(request), Box::new(action)));
    }
}

impl Drop for DockerProxy {
    /// The listening thread stays; what it was to do does not.
    fn drop(&mut self) {
        *lock(&self.shared.next) = None;
    }
}

fn serve(driver: UnixStream, shared: &Shared) -> Option<()> {
    let docker = UnixStream::connect(&shared.docker).ok()?;
    let (from_docker, to_driver) = (docker.try_clone().ok()?, driver.try_clone().ok()?);
    thread::spawn(move || copy(from_docker, to_driver, |_| None));
    // A request begins a write of the client's; its body never looks like one.
    copy(driver, docker, |data| {
        let line = data.split(|byte| *byte == b'\r').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        let request = line.strip_suffix(" HTTP/1.1")?.split('?').next()?;
        lock(&shared.seen).push(request.to_owned());
        let (_, action) = lock(&shared.next).take_if(|(is, _)| is(request))?;
        Some(action)
    });
    Some(())
}

/// Copies until either side ends; what `see` answers is done once the piece has been passed on.
fn copy(mut from: UnixStream, mut to: UnixStream, mut see: impl FnMut(&[u8]) -> Option<Action>) {
    let mut buffer = vec![0; 64 << 10];
    let mut piece = || -> io::Result<bool> {
        let len = from.read(&mut buffer)?;
        let action = see(&buffer[..len]);
        to.write_all(&buffer[..len])?;
        if let Some(action) = action {
            action();
        }
        Ok(len > 0)
    };
    while piece().unwrap_or(false) {}
    let _closed_already = to.shutdown(Shutdown::Write);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
