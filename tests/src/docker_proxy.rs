//! A proxy between a driver and dockerd: records requests, and can act in the middle of one.

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

/// A socket like dockerd's. It serves until the process ends.
#[derive(Debug)]
pub struct DockerProxy {
    folder: TempDir,
    shared: Arc<Shared>,
}

struct Shared {
    docker: PathBuf,
    seen: Mutex<Vec<String>>,
    next: Mutex<Option<Next>>,
}

/// A request that the proxy waits for, and what to do then.
struct Next {
    is: Matches,
    when: When,
    action: Action,
}

/// The moment at which a [`DockerProxy`] acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// dockerd has received the request.
    Asked,
    /// dockerd has done the request and has answered. The answer does not reach the driver.
    Done,
    /// The request does not reach dockerd. The driver learns that the name is in use.
    Conflict,
}

/// What dockerd answers if the name of a container is in use.
const CONFLICT: &[u8] = b"HTTP/1.1 409 Conflict\r\nContent-Type: application/json\r\n\
Content-Length: 28\r\n\r\n{\"message\":\"name is in use\"}";

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("docker", &self.docker)
            .finish_non_exhaustive()
    }
}

impl DockerProxy {
    /// Starts a proxy for the dockerd of this socket.
    ///
    /// # Panics
    /// If the proxy's socket cannot be made.
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

    /// Runs `action` once, at this moment of the next request for which `request` is true.
    /// `request` sees the method and the path.
    pub fn on(
        &self,
        when: When,
        request: impl Fn(&str) -> bool + Send + 'static,
        action: impl FnOnce() + Send + 'static,
    ) {
        *lock(&self.shared.next) = Some(Next {
            is: Box::new(request),
            when,
            action: Box::new(action),
        });
    }
}

impl Drop for DockerProxy {
    /// The listening thread stays; the planned action is dropped.
    fn drop(&mut self) {
        *lock(&self.shared.next) = None;
    }
}

fn serve(driver: UnixStream, shared: &Shared) -> Option<()> {
    let docker = UnixStream::connect(&shared.docker).ok()?;
    let (from_docker, to_driver) = (docker.try_clone().ok()?, driver.try_clone().ok()?);
    let mut answer = driver.try_clone().ok()?;
    // What to do instead of passing on an answer.
    let at_answer = Arc::new(Mutex::new(None::<Action>));
    let action = at_answer.clone();
    thread::spawn(move || {
        copy(from_docker, to_driver, |data, to| {
            if let Some(action) = lock(&action).take() {
                action();
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            to.write_all(data)
        });
    });
    // A request is at the start of a write by the client; a body never looks like a request.
    copy(driver, docker, |data, to| {
        let (when, action) = match see(data, shared) {
            Some(Next { when, action, .. }) => (when, action),
            None => return to.write_all(data),
        };
        match when {
            When::Asked => {
                to.write_all(data)?;
                action();
            }
            When::Done => {
                *lock(&at_answer) = Some(action);
                to.write_all(data)?;
            }
            When::Conflict => {
                action();
                answer.write_all(CONFLICT)?;
            }
        }
        Ok(())
    });
    Some(())
}

/// Records the start of a request, if `data` is one. Returns the action that waits for it.
fn see(data: &[u8], shared: &Shared) -> Option<Next> {
    let line = data.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let request = line.strip_suffix(" HTTP/1.1")?.split('?').next()?;
    lock(&shared.seen).push(request.to_owned());
    lock(&shared.next).take_if(|next| (next.is)(request))
}

/// Passes on each piece of data until either side closes.
fn copy(
    mut from: UnixStream,
    mut to: UnixStream,
    mut pass: impl FnMut(&[u8], &mut UnixStream) -> io::Result<()>,
) {
    let mut buffer = vec![0; 64 << 10];
    let mut all = || -> io::Result<()> {
        loop {
            match from.read(&mut buffer)? {
                0 => return Ok(()),
                len => pass(&buffer[..len], &mut to)?,
            }
        }
    };
    let ended = all();
    // After an end of data the other direction continues; after an error it does not.
    let how = ended.map_or(Shutdown::Both, |()| Shutdown::Write);
    let _closed_already = to.shutdown(how);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
