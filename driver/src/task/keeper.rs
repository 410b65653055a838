//! The task that owns one plain task, from its start or the driver's start to its end.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use polydev_proto::init::{Exited, Release, exited, to_init};
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::Instrument;

use super::{
    Exit, Task, Tasks,
    journal::Entry,
    listen::{Word, listen, signal},
    output,
    plan::OutputPath,
};
use crate::{
    broker::Opened,
    images::Use,
    limits,
    link::{Link, Listener},
    process::Held,
    site::Site,
    ticks::ticks,
};

/// An end before this is early.
const EARLY: Duration = Duration::from_secs(10);
/// How often to check for processes that the kernel killed for lack of memory.
const OOM_INTERVAL: Duration = Duration::from_secs(1);
/// Time between requests to a dockerd that does not respond.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);
/// How long the end of a task waits for an agent to read its last output, while somebody
/// waits for the end. While nobody waits for the end, only a copy from Docker's log driver has
/// a limit (`output::READ_TIMEOUT`).
const UNREAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long process 1 of a plain task may take to end after SIGKILL, before the driver asks
/// Docker to remove the container, and again after that.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// The error of a task whose command never ran; such a task may be started again.
pub(crate) const NEVER_STARTED: &str = "the driver was restarted before the command was started";
const SIGKILL: i32 = nix::sys::signal::Signal::SIGKILL as i32;

/// A task's container, held by this process.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) entry: Entry,
    /// `None` if the process ended before it could be held.
    pub(super) process: Option<Held>,
    pub(super) limits: Option<Arc<limits::Handle>>,
    pub(super) listener: Option<Listener>,
    /// `None` until init has connected.
    pub(super) link: Option<Link>,
    /// Until the task has ended.
    pub(super) outside: Option<Opened>,
}

/// Adds a task to the book and follows it to its end.
pub(super) fn keep(tasks: &Arc<Tasks>, live: Live, held: Use) -> Arc<Task> {
    let (signals, received) = mpsc::channel(8);
    let task = Arc::new(Task {
        entry: live.entry.clone(),
        signals,
        kill: CancellationToken::new(),
        end: watch::Sender::new(None),
        limits: live.limits.clone(),
        used: Default::default(),
        _image: held,
    });
    tasks.book.add(task.clone());
    let limits = live.limits.clone();
    let keeper = Keeper {
        tasks: tasks.clone(),
        task: task.clone(),
        live,
        signals: received,
        // Kills in an earlier life of the driver were already reported.
        oom_kills: limits.as_ref().map_or(0, |limits| limits.oom_kills()),
        oom_seen: None,
        copied: Arc::default(),
    };
    let span = tracing::info_span!("task", task_id = task.entry.identity.task_id);
    tasks.site.background.spawn(keeper.run().instrument(span));
    task
}

/// Recovers every task of the journal, before Nomad can ask for one.
pub(crate) fn recover(tasks: &Arc<Tasks>) {
    for entry in tasks.journal.read() {
        let process = Held::find(entry.pid, entry.pid_start);
        let limits = process
            .as_ref()
            .and_then(|_| limits::Handle::open_shaped(entry.pid, None).ok());
        let listener = match (&entry.link, &process) {
            (Some(folder), Some(_)) => Listener::bind_again(folder)
                .inspect_err(|error| {
                    tracing::warn!(error = crate::chain(error), "init cannot reconnect")
                })
                .ok(),
            _ => None,
        };
        let rate = entry.broker_rate.filter(|_| process.is_some());
        let outside = rate.map(|rate| tasks.site.broker.keep(&entry.container, rate));
        let held = tasks.site.images.hold(&entry.image);
        tracing::info!(
            task = entry.identity.task_id,
            alive = process.is_some(),
            "recovered"
        );
        let live = Live {
            entry,
            process,
            limits: limits.map(Arc::new),
            listener,
            link: None,
            outside,
        };
        keep(tasks, live, held);
    }
}

struct Keeper {
    tasks: Arc<Tasks>,
    task: Arc<Task>,
    live: Live,
    signals: mpsc::Receiver<i32>,
    /// How many of them have been reported.
    oom_kills: u64,
    /// When the last kill was seen.
    oom_seen: Option<Instant>,
    /// Bytes of output that the driver itself copied.
    copied: Arc<AtomicU64>,
}

impl Keeper {
    async fn run(mut self) {
        let pump = self.pump();
        let exit = match self.live.entry.exit.clone() {
            Some(exit) => exit,
            None => self.ended().await,
        };
        if self.live.entry.exit.is_none() {
            self.live.entry.exit = Some(exit.clone());
            self.tell_early_end(&exit);
            if let Err(error) = self.tasks.journal.write(&self.live.entry) {
                tracing::warn!(
                    error = crate::chain(&error),
                    "cannot record a task's end in the journal"
                );
            }
        }
        let _last = self.task.usage();
        self.output_is_read(pump).await;
        self.task.end.send_replace(Some(exit));
    }

    /// Copies the output if dockerd has it.
    fn pump(&self) -> Option<AbortOnDropHandle<()>> {
        let entry = &self.live.entry;
        if entry.output != OutputPath::Docker {
            return None;
        }
        if [&entry.stdout, &entry.stderr]
            .iter()
            .all(|path| output::is_nowhere(path))
        {
            return None;
        }
        let (tasks, identity) = (self.tasks.clone(), entry.identity.clone());
        let pump = output::pump(
            tasks.site.docker.clone(),
            entry.container.clone(),
            entry.marked,
            [entry.stdout.clone(), entry.stderr.clone()],
            {
                let tasks = tasks.clone();
                move || tasks.journal.mark(&identity)
            },
            self.copied.clone(),
        );
        let pump = async move {
            // A newly started driver has not yet agreed on a version with dockerd.
            let mut ready = tasks.site.ready.subscribe();
            drop(ready.wait_for(|ready| *ready).await);
            pump.await;
        };
        Some(AbortOnDropHandle::new(
            self.tasks.site.background.spawn(pump),
        ))
    }

    /// Serves the running task until it has ended.
    async fn ended(&mut self) -> Exit {
        let mut looks = ticks(OOM_INTERVAL);
        let (task, tasks) = (self.task.clone(), self.tasks.clone());
        loop {
            let Live {
                process,
                listener,
                link,
                entry,
                outside,
                ..
            } = &mut self.live;
            let Some(process) = process else {
                return self.ask_docker().await;
            };
            tokio::select! {
                biased;
                word = listen(listener, link, outside.as_ref(), entry.pid) => match word {
                    Word::Exited(exited) => return self.exited(&exited),
                    Word::Nothing => {}
                    // The driver died between the start of the container and of the
                    // command.
                    Word::NotStarted => {
                        self.end_process().await;
                        return self.failed(NEVER_STARTED);
                    }
                },
                Some(number) = self.signals.recv() => signal(process, link, number).await,
                () = process.ended() => return self.ask_docker().await,
                () = task.kill.cancelled() => {
                    self.end_process().await;
                    return self.ask_docker().await;
                }
                _ = looks.tick() => self.tell_oom_kills(&tasks.site),
            }
        }
    }

    fn exited(&mut self, exited: &Exited) -> Exit {
        let (code, signal) = match exited.status {
            Some(exited::Status::Code(code)) => (code, 0),
            Some(exited::Status::Signal(signal)) => (128 + signal, signal),
            None => return self.failed("init did not report how the command ended"),
        };
        let tasks = self.tasks.clone();
        self.tell_oom_kills(&tasks.site);
        Exit {
            code,
            signal,
            // Also if a child was killed, and the task failed because of it.
            oom_killed: code != 0 && self.is_out_of_memory(),
            error: String::new(),
            at: Some(SystemTime::now()),
        }
    }

    /// Process 1 has ended without a report from init. dockerd knows how, once it responds.
    async fn ask_docker(&self) -> Exit {
        let id = &self.live.entry.container;
        loop {
            match self.tasks.site.docker.state(id).await {
                Ok(state) if state.pid == 0 => {
                    let code = i32::try_from(state.exit_code).unwrap_or(i32::MAX);
                    return Exit {
                        code,
                        signal: if (129..160).contains(&code) {
                            code - 128
                        } else {
                            0
                        },
                        oom_killed: state.oom_killed || (code != 0 && self.is_out_of_memory()),
                        error: String::new(),
                        at: Some(SystemTime::now()),
                    };
                }
                Ok(state) if state.pid != self.live.entry.pid || self.task.kill.is_cancelled() => {
                    let _the_reapers = self.tasks.site.docker.remove(id).await;
                    return self.failed("its container was started by another program");
                }
                Ok(_) => {}
                Err(error) if error.is_not_found() && self.task.kill.is_cancelled() => {
                    return self.failed("");
                }
                Err(error) if error.is_not_found() => {
                    return self.failed("its container was removed by another program");
                }
                Err(error) if self.task.kill.is_cancelled() => {
                    return self.failed(&crate::chain(&error));
                }
                Err(error) => tracing::debug!(
                    error = crate::chain(&error),
                    "cannot find out how a task ended, retrying"
                ),
            }
            sleep(RETRY_INTERVAL).await;
        }
    }

    /// Whether the kernel killed something a moment ago. The task survived kills long
    /// before its end.
    fn is_out_of_memory(&self) -> bool {
        self.oom_seen
            .is_some_and(|seen| seen.elapsed() < 3 * OOM_INTERVAL)
    }

    fn failed(&self, error: &str) -> Exit {
        Exit {
            code: 128 + SIGKILL,
            signal: SIGKILL,
            oom_killed: self.is_out_of_memory(),
            error: error.to_owned(),
            at: Some(SystemTime::now()),
        }
    }

    fn tell_oom_kills(&mut self, site: &Site) {
        let kills = self
            .live
            .limits
            .as_ref()
            .map_or(0, |limits| limits.oom_kills());
        if kills > self.oom_kills {
            let count = kills - self.oom_kills;
            self.oom_kills = kills;
            self.oom_seen = Some(Instant::now());
            let processes = if count == 1 { "a process" } else { "processes" };
            let message =
                format!("Out of memory: the kernel killed {processes} of the task ({count})");
            site.events.send(&self.live.entry.identity, message);
        }
    }

    /// Tells of what may have ended the task. Whoever starts a program as another user sees only
    /// that program's words.
    fn tell_early_end(&self, exit: &Exit) {
        let entry = &self.live.entry;
        let end = exit.at.unwrap_or_else(SystemTime::now);
        let after = end.duration_since(entry.started).unwrap_or_default();
        if entry.no_new_privileges && exit.code != 0 && exit.signal == 0 && after < EARLY {
            let message = "It ended early, and no program in it can become another user (sudo, su), \
                because the plugin sets `no_new_privileges`. If it has to, set \
                `security_opt = [\"no-new-privileges=false\"]`";
            let site = &self.tasks.site;
            site.events.send(&entry.identity, message.into());
        }
    }

    /// Waits until Nomad has read the task's output: init ends when its FIFOs are empty,
    /// and dockerd's stream ends after the container. The wait is limited if an agent does
    /// not read. If the agent is away, only a copy from Docker's log driver is limited.
    async fn output_is_read(&mut self, pump: Option<AbortOnDropHandle<()>>) {
        let (task, copied) = (self.task.clone(), self.copied.clone());
        let is_given_up = tokio::select! {
            () = self.is_gone(pump) => return,
            () = task.kill.cancelled() => false,
            () = is_unread(&task, &copied) => true,
        };
        if is_given_up {
            let message = "Nomad does not read the task's last output; it is lost";
            self.tasks
                .site
                .events
                .send(&task.entry.identity, message.into());
        }
        self.end_process().await;
    }

    /// Ends process 1 without init's help. If it does not die, for example in a paused
    /// container, dockerd must remove the container.
    async fn end_process(&self) {
        let Some(process) = &self.live.process else {
            return;
        };
        process.kill();
        if timeout(KILL_TIMEOUT, process.ended()).await.is_err() {
            let _the_reapers = self
                .tasks
                .site
                .docker
                .remove(&self.live.entry.container)
                .await;
            let _still_there = timeout(KILL_TIMEOUT, process.ended()).await;
        }
    }

    /// Tells init to exit, and waits until it has and until all output is copied.
    async fn is_gone(&mut self, pump: Option<AbortOnDropHandle<()>>) {
        let Live {
            process,
            listener,
            link,
            entry,
            outside,
            ..
        } = &mut self.live;
        // Its command has ended.
        *outside = None;
        let mut is_released = false;
        while let Some(process) = process {
            if !is_released && let Some(link) = link {
                let release = to_init::Message::Release(Release {});
                is_released = link.writer.send(release).await.is_ok();
            }
            tokio::select! {
                () = process.ended() => break,
                // Each new connection gets the message again.
                _ = listen(listener, link, None, entry.pid) => is_released &= link.is_some(),
            }
        }
        if let Some(pump) = pump {
            let _panicked = pump.await;
        }
    }
}

/// Returns when somebody has waited for the task's end for too long without progress.
async fn is_unread(task: &Task, copied: &AtomicU64) {
    let (mut since, mut seen) = (None, 0);
    loop {
        sleep(RETRY_INTERVAL).await;
        let now = copied.load(Ordering::Relaxed);
        let is_stuck = task.end.receiver_count() > 0 && now == seen;
        seen = now;
        since = since
            .filter(|_| is_stuck)
            .or_else(|| is_stuck.then(Instant::now));
        if since.is_some_and(|since| since.elapsed() > UNREAD_TIMEOUT) {
            return;
        }
    }
}
