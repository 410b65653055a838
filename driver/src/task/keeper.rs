//! The task that owns one plain task from its start, or from the driver's, to its end.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use polydev_proto::init::{Exited, Release, Signal, exited, from_init, hello, to_init};
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::Instrument;

use super::{Exit, Task, Tasks, journal::Entry, output, plan::OutputPath};
use crate::{
    images::Use,
    limits,
    link::{Greeted, Link, Listener},
    process::Held,
    site::Site,
    ticks::ticks,
};

/// How often to look for processes that the kernel killed for want of memory.
const OOM_INTERVAL: Duration = Duration::from_secs(1);
/// Between questions to a dockerd that does not answer.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);
/// How long the end of a task waits for an agent to read its last output, once
/// somebody waits for the end.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(10);
/// For a killed process to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// How a task failed whose command has not run: it may be started anew.
pub(crate) const NEVER_STARTED: &str = "the driver was restarted before the command was started";
const SIGKILL: i32 = nix::sys::signal::Signal::SIGKILL as i32;

/// A task's container, held by this process.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) entry: Entry,
    /// `None` when it was over before it could be held.
    pub(super) process: Option<Held>,
    pub(super) limits: Option<Arc<limits::Handle>>,
    pub(super) listener: Option<Listener>,
    /// `None` until init has connected.
    pub(super) link: Option<Link>,
}

/// Puts a task into the book and sees it through.
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
        // What was killed in an earlier life of the driver has been told.
        oom_kills: limits.as_ref().map_or(0, |limits| limits.oom_kills()),
        oom_seen: None,
        copied: Arc::default(),
    };
    let span = tracing::info_span!("task", task_id = task.entry.identity.task_id);
    tasks.site.background.spawn(keeper.run().instrument(span));
    task
}

/// Takes up every task of the journal, before Nomad can ask for one.
pub(crate) fn recover(tasks: &Arc<Tasks>) {
    for entry in tasks.journal.read() {
        let process = Held::find(entry.pid, entry.pid_start);
        let limits = process
            .as_ref()
            .and_then(|_| limits::Handle::open_shaped(entry.pid, None).ok());
        let listener = match (&entry.link, &process) {
            (Some(folder), Some(_)) => Listener::bind_again(folder)
                .inspect_err(|error| {
                    tracing::warn!(error = crate::chain(error), "init cannot come back")
                })
                .ok(),
            _ => None,
        };
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
        };
        keep(tasks, live, held);
    }
}

struct Keeper {
    tasks: Arc<Tasks>,
    task: Arc<Task>,
    live: Live,
    signals: mpsc::Receiver<i32>,
    /// As many have been told.
    oom_kills: u64,
    /// When the last of them were seen.
    oom_seen: Option<Instant>,
    /// Bytes of output that the driver itself has copied.
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
            if let Err(error) = self.tasks.journal.write(&self.live.entry) {
                tracing::warn!(
                    error = crate::chain(&error),
                    "a task's end is not in the journal"
                );
            }
        }
        let _last = self.task.usage();
        self.output_is_read(pump).await;
        self.task.end.send_replace(Some(exit));
    }

    /// Where dockerd has the output, the driver copies it.
    fn pump(&self) -> Option<AbortOnDropHandle<()>> {
        let entry = &self.live.entry;
        if entry.output == OutputPath::Init {
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
            // A driver that has just been started and dockerd have yet to agree on a version.
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
                ..
            } = &mut self.live;
            let Some(process) = process else {
                return self.ask_docker().await;
            };
            tokio::select! {
                biased;
                word = listen(listener, link, entry.pid) => match word {
                    Word::Exited(exited) => return self.exited(&exited),
                    Word::Nothing => {}
                    // The driver died between the container's start and the command's.
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
            None => return self.failed("init did not say how the command ended"),
        };
        let tasks = self.tasks.clone();
        self.tell_oom_kills(&tasks.site);
        Exit {
            code,
            signal,
            // Of a child too, if the task did not get over it.
            oom_killed: code != 0 && self.is_out_of_memory(),
            error: String::new(),
            at: Some(SystemTime::now()),
        }
    }

    /// Process 1 has ended without init's word: dockerd knows how, as soon as it answers.
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
                    return self.failed("its container was started by somebody else");
                }
                Ok(_) => {}
                Err(error) if error.is_not_found() && self.task.kill.is_cancelled() => {
                    return self.failed("");
                }
                Err(error) if error.is_not_found() => {
                    return self.failed("its container was removed by somebody else");
                }
                Err(error) if self.task.kill.is_cancelled() => {
                    return self.failed(&crate::chain(&error));
                }
                Err(error) => tracing::debug!(
                    error = crate::chain(&error),
                    "asking again how a task ended"
                ),
            }
            sleep(RETRY_INTERVAL).await;
        }
    }

    /// The kernel has killed something a moment ago. What it killed long before the end
    /// the task got over.
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

    /// The end of a task is told when its output is in Nomad's hands: init goes when its
    /// FIFOs are empty, and dockerd's stream ends after the container. An agent that does
    /// not read is not waited for for ever, but one that is away is.
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

    /// Ends process 1 without init's help; one that does not die, as in a paused
    /// container, is dockerd's to remove.
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

    /// Lets init go and waits until it has, and until nothing is left to be copied.
    async fn is_gone(&mut self, pump: Option<AbortOnDropHandle<()>>) {
        let Live {
            process,
            listener,
            link,
            entry,
            ..
        } = &mut self.live;
        let mut is_released = false;
        while let Some(process) = process {
            if !is_released && let Some(link) = link {
                let release = to_init::Message::Release(Release {});
                is_released = link.writer.send(release).await.is_ok();
            }
            tokio::select! {
                () = process.ended() => break,
                // Whatever it was, the next connection is told again.
                _ = listen(listener, link, entry.pid) => is_released &= link.is_some(),
            }
        }
        if let Some(pump) = pump {
            let _panicked = pump.await;
        }
    }
}

/// Answers when somebody has waited for the task's end for long, and nothing moved.
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

/// What init says of its command.
enum Word {
    Exited(Exited),
    NotStarted,
    /// The connection came or went.
    Nothing,
}

/// Waits for init to say something, or to come back.
///
/// # Cancel safety
/// Loses nothing that init will not say again.
async fn listen(listener: &Option<Listener>, link: &mut Option<Link>, pid: u32) -> Word {
    if let Some(connected) = link {
        return match connected.reader.next().await {
            Ok(from_init::Message::Exited(exited)) => Word::Exited(exited),
            Ok(other) => {
                tracing::debug!(?other, "init spoke out of turn");
                Word::Nothing
            }
            // It comes back, or its end is seen.
            Err(_) => {
                *link = None;
                Word::Nothing
            }
        };
    }
    let Some(listener) = listener else {
        return std::future::pending().await;
    };
    match listener.accept(|peer| peer == pid).await {
        Ok(Greeted {
            state, link: new, ..
        }) => {
            *link = Some(new);
            match state {
                hello::State::Exited(exited) => Word::Exited(exited),
                hello::State::Running(_) => Word::Nothing,
                hello::State::Waiting(_)
                | hello::State::Receiving(_)
                | hello::State::NotStarted(_) => Word::NotStarted,
            }
        }
        Err(error) => {
            tracing::debug!(error = crate::chain(&error), "init came and went");
            sleep(RETRY_INTERVAL).await;
            Word::Nothing
        }
    }
}

/// To the command through init, which alone knows it. Init that is not connected, as
/// after a restart of the driver, passes on what it is sent; without init process 1 is
/// the command.
async fn signal(process: &Held, link: &mut Option<Link>, number: i32) {
    let Some(connected) = link else {
        return process.signal(number);
    };
    let signal = to_init::Message::Signal(Signal { number });
    if connected.writer.send(signal).await.is_err() {
        *link = None;
        process.signal(number);
    }
}
