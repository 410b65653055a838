//! Starts a plain task. With init, everything is in place before
//! the first instruction of the command.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, SystemTime},
};

use polydev_proto::{
    driver::TaskConfig,
    init::{NotStarted, PlainTask, Start, from_init, hello, plain_task, to_init},
};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{sleep, timeout},
};

use super::{
    Task, Tasks,
    journal::Entry,
    keeper::{self, Live},
    neighbour, output, outside,
    plan::{self, OutputPath, Plan},
};
use crate::{
    config,
    docker::{
        self, InitMounts,
        name::{self, Holder},
        removal,
    },
    identity::Identity,
    images, limits,
    link::{self, Greeted, Link, Listener},
    netlink::{self, AddressFamily},
    process::{Held, is_of_container},
    site::Site,
    state::files,
};

/// Time from the container's start until its init connects; a busy node may need many
/// seconds.
const INIT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a process that has left its control groups may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(1);
/// How long init may take to start the command.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a plain task was not started; nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Plan(#[from] plan::Error),
    #[error(transparent)]
    Image(#[from] images::Error),
    #[error(transparent)]
    Docker(#[from] docker::Error),
    #[error("task `{name}`, whose network this task shares, has ended meanwhile")]
    Neighbour { name: String },
    #[error("a container named `{name}` already exists and does not belong to this driver")]
    Taken { name: String },
    #[error(transparent)]
    InitEnded(#[from] docker::Ended),
    #[error("init was not ready within {} s; an image that must be process 1 itself, or a runtime without Unix sockets, requires `init = false`", INIT_TIMEOUT.as_secs())]
    InitTimedOut,
    #[error("init cannot be used")]
    Link(#[from] link::Error),
    #[error("{message}")]
    Command { message: String },
    #[error("cannot open the task's log `{path}`")]
    Log { path: String, source: io::Error },
    #[error("cannot limit the container")]
    Limits(#[from] limits::Error),
    #[error("the container ended at once")]
    Gone(#[source] io::Error),
    #[error(transparent)]
    Outside(#[from] outside::Error),
    #[error("cannot record the task")]
    Journal(#[from] files::Error),
    #[error("cannot make a folder for the sources of its mounts")]
    Stage(#[source] io::Error),
}

impl Error {
    /// Whether Nomad's restart policy should try again: not if the job must be changed first.
    #[must_use]
    pub fn is_recoverable(&self) -> bool {
        match self {
            Self::Plan(error) => error.is_recoverable(),
            Self::Command { .. } | Self::Taken { .. } => false,
            Self::Image(error) => error.is_recoverable(),
            Self::Docker(error) => !error.is_refused(),
            Self::InitEnded(_)
            | Self::InitTimedOut
            | Self::Link(_)
            | Self::Log { .. }
            | Self::Limits(_)
            | Self::Gone(_)
            | Self::Stage(_)
            | Self::Neighbour { .. }
            | Self::Journal(_) => true,
            Self::Outside(error) => error.is_recoverable(),
        }
    }
}

impl Error {
    /// Docker does not find the container of the other task, which may be there again soon.
    fn of_neighbour(self, network_of: Option<String>) -> Self {
        match (self, network_of) {
            (Self::Docker(error), Some(name)) if error.is_not_found() => Self::Neighbour { name },
            (other, _) => other,
        }
    }
}

/// Starts a task and adds it to the book.
///
/// # Errors
/// [`Error`]; nothing is left then.
///
/// # Cancel safety
/// None: spawn it.
pub async fn start(
    tasks: &Arc<Tasks>,
    task: &TaskConfig,
    options: config::Task,
) -> Result<Arc<Task>, Error> {
    let started = make(tasks, task, options).await;
    if started.is_err() {
        tasks.journal.remove(&Identity::of(task));
    }
    started
}

async fn make(
    tasks: &Arc<Tasks>,
    task: &TaskConfig,
    options: config::Task,
) -> Result<Arc<Task>, Error> {
    let site = &*tasks.site;
    let mut plan = Plan::make(tasks, task, options)?;
    let tell = |step: images::Step| {
        site.events
            .send(&plan.identity, step.message(&plan.options.image));
    };
    let (image, held) = site.images.get(&plan.want(), tell).await?;
    let argv = plan.see(&image, &site.config)?;
    let stop_signal = image.stop_signal.as_deref().unwrap_or("SIGTERM");

    let listener = match plan.options.init {
        Some(false) => None,
        _ => Some(Listener::bind(&site.link_dir)?),
    };
    let init = listener.as_ref().map(|listener| InitMounts {
        init: &site.init,
        link: listener.folder(),
    });
    // It stays until the container has started, or until its removal was requested.
    let staged = tasks.stage.begin().map_err(Error::Stage)?;
    let spec = plan.spec(site, init, &staged)?;
    let network_of = plan.network_of.clone();
    let created = create(site, &spec).await;
    let container = created.map_err(|error| error.of_neighbour(network_of))?;
    let folder = listener
        .as_ref()
        .map(|listener| listener.folder().to_owned());
    let gone = plan.network_of.clone();
    let made = async {
        let running = run(site, &container, listener).await?;
        let live = prepare(tasks, &plan, task, &container, stop_signal, running).await?;
        begin(live, &plan, argv).await
    };
    match made.await {
        Ok(live) => {
            let task = keeper::keep(tasks, live, held);
            for note in plan.notes {
                site.events.send(&plan.identity, note);
            }
            neighbour::tell(tasks, &task);
            neighbour::tell_if_behind(tasks, &task, &plan.place.network.mode);
            Ok(task)
        }
        Err(error) => {
            if let Some(folder) = &folder {
                let _gone_already = std::fs::remove_dir_all(folder);
            }
            removal::remove(&site.docker, &container).await;
            Err(error.of_neighbour(gone))
        }
    }
}

/// Creates the container, and replaces one of the same name that a failed attempt left.
async fn create(site: &Site, spec: &docker::PlainSpec<'_>) -> Result<String, Error> {
    for wait in name::waits() {
        match create_once(site, spec).await {
            Err(error) if error.is_conflict() => {}
            created => return Ok(created?),
        }
        match site.docker.holder(&spec.name, &site.instance).await? {
            Holder::Other => {
                return Err(Error::Taken {
                    name: spec.name.clone(),
                });
            }
            Holder::Ours => site.docker.remove(&spec.name).await?,
            Holder::Nobody => {}
        }
        // A removal that had already begun goes on.
        sleep(wait).await;
    }
    Ok(create_once(site, spec).await?)
}

async fn create_once(site: &Site, spec: &docker::PlainSpec<'_>) -> Result<String, docker::Error> {
    let created = site.docker.create_plain(spec).await;
    if created.as_ref().is_err_and(|error| !error.is_answer()) {
        removal::remove_if_made(&site.docker, &spec.name);
    }
    created
}

/// A container whose process 1 runs.
struct Running {
    pid: u32,
    link: Option<(Listener, Link)>,
    /// Where the container asks the broker.
    requests: Option<OwnedFd>,
}

async fn run(site: &Site, container: &str, listener: Option<Listener>) -> Result<Running, Error> {
    let (docker, id) = (site.docker.clone(), container.to_owned());
    let mut started: JoinHandle<_> = site
        .background
        .spawn(async move { docker.start(&id).await });
    let Some(listener) = listener else {
        started.await.expect("starting does not panic")?;
        let state = site.docker.state(container).await?;
        // The keeper notices if it has already ended.
        return Ok(Running {
            pid: state.pid,
            link: None,
            requests: None,
        });
    };
    let accept = async {
        let accept = timeout(
            INIT_TIMEOUT,
            listener.accept(|pid| is_of_container(pid, container)),
        );
        let mut accept = std::pin::pin!(accept);
        tokio::select! {
            // Init may connect before dockerd responds, so there is no need to wait for
            // dockerd.
            accepted = &mut accept => Ok(accepted),
            started = &mut started => {
                started.expect("starting does not panic")?;
                tokio::select! {
                    accepted = &mut accept => Ok(accepted),
                    ended = site.docker.ended(container) => Err(Error::InitEnded(ended?)),
                }
            }
        }
    };
    let accepted = accept.await?;
    let greeted = accepted.map_err(|_| Error::InitTimedOut)?;
    let Greeted {
        pid,
        link,
        state,
        requests,
        ..
    } = greeted?;
    if !matches!(state, hello::State::Waiting(_)) {
        return Err(link::Error::NotWaiting.into());
    }
    Ok(Running {
        pid,
        link: Some((listener, link)),
        requests,
    })
}

/// Sets up limits, address and journal. With init, they precede the command.
async fn prepare(
    tasks: &Tasks,
    plan: &Plan<'_>,
    task: &TaskConfig,
    container: &str,
    stop_signal: &str,
    running: Running,
) -> Result<Live, Error> {
    let Running {
        pid,
        link,
        requests,
    } = running;
    let (rates, has_address) = (plan.place.rates, plan.place.has_address);
    let family = match plan.options.advertise_ipv6_address {
        true => AddressFamily::Inet6,
        false => AddressFamily::Inet,
    };
    let look = spawn_blocking(move || {
        let process = Held::open(pid);
        let limits = limits::Handle::open_shaped(pid, rates.as_ref());
        let address =
            || netlink::connect_in(pid).and_then(|socket| netlink::address(&socket, family));
        let address = if has_address {
            address().ok().flatten()
        } else {
            None
        };
        (process, limits, address)
    });
    let (process, limits, address) = look.await.expect("looking does not panic");
    let (process, limits) = match (process, link.is_some()) {
        // Without init, the command already runs and may end in the meantime. It leaves its
        // control groups a moment before its end is seen.
        (Ok(process), false)
            if limits.is_err() && timeout(END_TIMEOUT, process.ended()).await.is_ok() =>
        {
            (Some(process), None)
        }
        (Ok(process), _) => (Some(process), Some(Arc::new(limits?))),
        // Without init, a short command may already be over.
        (Err(_), false) => (None, None),
        (Err(error), true) => return Err(Error::Gone(error)),
    };
    let outside = match &plan.outside {
        Some(outside) => {
            let requests = requests.ok_or(link::Error::NotListening)?;
            let (broker, rate) = (&tasks.site.broker, plan.place.broker_rate);
            Some(outside.open(broker, container, rate, requests).await?)
        }
        None => None,
    };
    let off = tasks.site.config.disable_log_collection;
    let log = |path: &str| {
        if off || path.is_empty() {
            "/dev/null".into()
        } else {
            path.into()
        }
    };
    let (mut listener, link) = link.map_or((None, None), |(listener, link)| {
        (Some(listener), Some(link))
    });
    let entry = Entry {
        identity: plan.identity.clone(),
        image: plan.options.image.clone(),
        container: container.to_owned(),
        pid,
        pid_start: process.as_ref().map_or(0, |process| process.start),
        started: SystemTime::now(),
        link: listener
            .as_ref()
            .map(|listener| listener.folder().to_owned()),
        broker_rate: outside.is_some().then_some(plan.place.broker_rate),
        output: plan.output,
        stdout: log(&task.stdout_path),
        stderr: log(&task.stderr_path),
        stop_signal: stop_signal.to_owned(),
        address,
        auto_advertise: plan.place.is_users_own || plan.options.advertise_ipv6_address,
        ports: {
            let ports = plan.place.ports.iter();
            let ports = ports.map(|port| (port.label.clone(), port.container_port.into()));
            ports.collect()
        },
        network_of: plan.network_of.clone(),
        no_new_privileges: plan.is_held_by(&tasks.site.config),
        exit: None,
        marked: None,
    };
    tasks.journal.write(&entry)?;
    if let Some(listener) = &mut listener {
        listener.keep();
    }
    Ok(Live {
        entry,
        process,
        limits,
        listener,
        link,
        outside,
    })
}

/// Tells init to start the command.
async fn begin(mut live: Live, plan: &Plan<'_>, argv: Vec<String>) -> Result<Live, Error> {
    let Some(link) = &mut live.link else {
        return Ok(live);
    };
    let output = match plan.output {
        OutputPath::Init => plain_task::Output::Descriptors,
        OutputPath::Both => plain_task::Output::Both,
        OutputPath::Docker => plain_task::Output::Inherited,
    };
    let start = Start {
        run_id: plan.identity.task_id.clone(),
        argv: argv.into_iter().map(Into::into).collect(),
        stdin: plan.options.interactive,
        task: Some(PlainTask {
            output: output.into(),
            tty: plan.options.tty,
        }),
        ..Default::default()
    };
    let start = to_init::Message::Start(start.into());
    match plan.output {
        OutputPath::Init | OutputPath::Both => {
            let open = |path: &std::path::Path| {
                output::open(path).map_err(|source| Error::Log {
                    path: path.display().to_string(),
                    source,
                })
            };
            let logs = [open(&live.entry.stdout)?, open(&live.entry.stderr)?];
            let logs = [logs[0].as_fd(), logs[1].as_fd()];
            link.writer.send_with(start, &logs).await?;
        }
        OutputPath::Docker => link.writer.send(start).await?,
    }
    let answer = timeout(START_TIMEOUT, link.reader.next()).await;
    match answer.map_err(|_| Error::InitTimedOut)?? {
        from_init::Message::Started(_) => Ok(live),
        from_init::Message::NotStarted(NotStarted { message, .. }) => {
            Err(Error::Command { message })
        }
        other => {
            tracing::warn!(?other, "init sent an unexpected message");
            Err(link::Error::NotWaiting.into())
        }
    }
}
