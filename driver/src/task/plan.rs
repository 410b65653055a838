//! A plain task's container, worked out before Docker is asked for anything. The only thing
//! that is written here is the folder with `hosts` and `resolv.conf` of a task in a group.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    path::PathBuf,
};

use polydev_proto::driver::TaskConfig;

use super::{
    Tasks,
    folders::Folders,
    mounts::{self, Mounts},
    neighbour,
    network::{self, Place},
    outside::{self, Outside},
    resources,
    stage::Staged,
};
use crate::{
    config::{self, Capabilities, Device, LogPath, Logging, Plugin, Task},
    docker::{Image, InitMounts, PlainSpec, Resources},
    identity::{Identity, labels},
    images::{Archive, Policy, Want},
    site::Site,
};

/// Far larger than any seccomp profile.
const MAX_PROFILE: u64 = 1 << 20;

/// Why a task cannot start as its job describes it. No container has been made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("invalid task config")]
    Config(#[from] config::Error),
    #[error("invalid task config")]
    Resources(#[from] resources::Error),
    #[error("invalid task config")]
    Mounts(#[from] mounts::Error),
    #[error("invalid task config")]
    Network(#[from] network::Error),
    #[error("invalid task config")]
    Neighbour(#[from] neighbour::Error),
    #[error("invalid task config")]
    Outside(#[from] outside::Error),
    #[error(
        "`runtime` is `{given}`: must be absent or `{nvidia}` beside a `device` block for NVIDIA"
    )]
    Runtime { given: String, nvidia: String },
    #[error("cannot use the seccomp profile `{path}` given in `security_opt`")]
    Profile { path: PathBuf, source: io::Error },
    #[error(
        "the image's program `{program}` must be process 1, and `{field}` needs polydev-init there; set `command`, or `init = true`"
    )]
    First {
        program: String,
        field: &'static str,
    },
    #[error("the image `{image}` has no default program; set `command` or `entrypoint`")]
    NoCommand { image: String },
}

impl Error {
    /// Whether the task may start without a change of its job.
    pub(super) fn is_recoverable(&self) -> bool {
        // The other task may run in a moment.
        matches!(
            self,
            Self::Mounts(mounts::Error::Stage { .. }) | Self::Neighbour(_)
        )
    }
}

/// How the task's output reaches Nomad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum OutputPath {
    /// Init writes it into Nomad's FIFOs.
    Init,
    /// The same, and Docker's log driver has a copy.
    Both,
    /// Docker's log driver keeps it, and the driver copies it from there.
    Docker,
}

/// Everything about a container that does not depend on its image.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    task: &'a TaskConfig,
    pub(super) options: Task,
    pub(super) identity: Identity,
    pub(super) place: Place,
    /// `None` if it needs no broker.
    pub(super) outside: Option<Outside>,
    /// What the job's author should know, for the task's events.
    pub(super) notes: Vec<String>,
    /// The task of the group whose network it shares.
    pub(super) network_of: Option<String>,
    pub(super) output: OutputPath,
    capabilities: Capabilities,
    resources: Resources,
    mounts: Mounts,
    archive: Option<Archive>,
    pids_limit: u32,
    logging: Logging,
    runtime: Option<String>,
    env: BTreeMap<String, String>,
}

/// Programs that must be process 1: of s6-overlay, of systemd and its relatives.
const FIRST: [&str; 5] = [
    "/init",
    "/sbin/init",
    "/usr/sbin/init",
    "/lib/systemd/systemd",
    "/usr/lib/systemd/systemd",
];

impl<'a> Plan<'a> {
    pub(super) fn make(
        tasks: &Tasks,
        task: &'a TaskConfig,
        mut options: Task,
    ) -> Result<Self, Error> {
        let Tasks {
            site,
            journal,
            book,
            ..
        } = tasks;
        let plugin = &site.config;
        for option in &mut options.security_opt {
            embed_profile(option)?;
        }
        let identity = Identity::of(task);
        let network_of = neighbour::resolve(book, task, &mut options)?;
        let files = journal.files(&identity);
        let (enforce, node) = (plugin.enforce_mbits, &site.resolv_conf);
        let mut place = network::place(task, &options, enforce, &files, node)?;
        let mut mounts = mounts::mounts(task, &options, plugin)?;
        mounts.extend(place.files.iter().cloned());
        let compute = &site.compute;
        let (output, logging) = output(&options, plugin);
        let mut notes = std::mem::take(&mut place.notes);
        notes.append(&mut mounts.notes);
        Ok(Self {
            notes,
            network_of,
            runtime: runtime(task, &options, plugin)?,
            env: env(task, &options),
            identity,
            capabilities: options.capabilities(plugin)?,
            resources: resources::resources(task, &options, compute.mhz, compute.cores)?,
            archive: options
                .load
                .as_ref()
                .map(|given| archive(&Folders::of(task), given))
                .transpose()?,
            mounts,
            pids_limit: options.pids_limit.unwrap_or(plugin.pids_limit),
            logging,
            place,
            outside: Outside::make(task, &options)?,
            output,
            task,
            options,
        })
    }

    pub(super) fn want(&self) -> Want<'_> {
        let options = &self.options;
        Want {
            reference: &options.image,
            policy: if options.force_pull {
                Policy::Always
            } else {
                Policy::IfMissingOrLatest
            },
            archive: self.archive.clone(),
            auth: options.auth.as_ref(),
            auth_soft_fail: options.auth_soft_fail,
            timeout: options.image_pull_timeout,
        }
    }

    /// The command. Leaves process 1 to the image's program, if it must be that and the job is
    /// silent.
    pub(super) fn see(&mut self, image: &Image, plugin: &Plugin) -> Result<Vec<String>, Error> {
        let argv = argv(&self.options, image)?;
        if self.options.init.is_some() || !FIRST.contains(&&*argv[0]) {
            return Ok(argv);
        }
        if let Some(field) = self.options.brokered_by() {
            let program = argv[0].clone();
            return Err(Error::First { program, field });
        }
        self.options.init = Some(false);
        (self.output, self.logging) = output(&self.options, plugin);
        self.notes.push(format!(
            "`{}` must be process 1: the task runs as with `init = false`",
            argv[0]
        ));
        Ok(argv)
    }

    /// # Errors
    /// If a source is no longer what it was when the plan was made.
    pub(super) fn spec<'s>(
        &'s self,
        site: &Site,
        init: Option<InitMounts<'s>>,
        staged: &Staged,
    ) -> Result<PlainSpec<'s>, Error> {
        let (binds, mounts) = self.mounts.stage(self.task, staged)?;
        let devices = self.task.devices.iter().map(|device| Device {
            host_path: device.host_path.clone(),
            container_path: device.task_path.clone(),
            permissions: device.cgroup_permissions.clone(),
        });
        Ok(PlainSpec {
            name: self.identity.container_name(),
            options: &self.options,
            labels: labels(
                &site.instance,
                self.task,
                &self.options.labels,
                &site.config.extra_labels,
            ),
            env: &self.env,
            user: &self.task.user,
            capabilities: self.capabilities.clone(),
            init,
            resources: self.resources.clone(),
            binds,
            mounts,
            devices: self
                .options
                .devices
                .iter()
                .cloned()
                .chain(devices)
                .collect(),
            network: self.place.network.clone(),
            ports: self.place.ports.clone(),
            logging: self.logging.clone(),
            pids_limit: self.pids_limit,
            no_new_privileges: self.is_held_by(&site.config),
            runtime: self.runtime.as_deref(),
        })
    }

    /// Whether the plugin, and not the job, keeps its programs from becoming other users.
    pub(super) fn is_held_by(&self, plugin: &Plugin) -> bool {
        let options = self.options.security_opt.iter();
        let mut names = options.map(|option| option.split(['=', ':']).next());
        let is_named = names.any(|name| name == Some("no-new-privileges"));
        plugin.no_new_privileges && !self.options.privileged && !is_named
    }
}

/// The way of the output, and what Docker does with its part.
fn output(options: &Task, plugin: &Plugin) -> (OutputPath, Logging) {
    // Only init's own messages.
    let little = || Logging {
        driver: "json-file".into(),
        config: [("max-size", "64k"), ("max-file", "1")]
            .map(|(key, value)| (key.into(), value.into()))
            .into(),
    };
    let is_docker = options.init == Some(false)
        || plugin.disable_log_collection
        || plugin.log_path == LogPath::Docker;
    match &options.logging {
        Some(own) => (OutputPath::Docker, own.clone()),
        None if is_docker => (OutputPath::Docker, plugin.logging.clone()),
        None if plugin.log_path == LogPath::Both => (OutputPath::Both, plugin.logging.clone()),
        None => (OutputPath::Init, little()),
    }
}

/// The task's variables, with those of its devices. Nomad does not know of `port_map`.
fn env(task: &TaskConfig, options: &Task) -> BTreeMap<String, String> {
    let mut env = task.device_env.clone();
    env.extend(task.env.clone());
    env.extend(options.port_map.iter().map(|(label, port)| {
        // As Nomad names variables.
        let is_kept = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        let label = label.replace(|letter| !is_kept(letter), "_");
        (format!("NOMAD_PORT_{label}"), port.to_string())
    }));
    env
}

/// The job's runtime, or that of NVIDIA's devices.
fn runtime(task: &TaskConfig, options: &Task, plugin: &Plugin) -> Result<Option<String>, Error> {
    const DEVICES: &str = "NVIDIA_VISIBLE_DEVICES";
    let nvidia = &plugin.nvidia_runtime;
    if !task.device_env.contains_key(DEVICES) {
        return Ok(options.runtime.clone());
    }
    match &options.runtime {
        Some(other) if other != nvidia => Err(Error::Runtime {
            given: other.clone(),
            nvidia: nvidia.clone(),
        }),
        _ => Ok(Some(nvidia.clone())),
    }
}

fn archive(folders: &Folders, given: &str) -> Result<Archive, mounts::Error> {
    match folders.archive(given) {
        Ok(file) => Ok(Archive {
            path: folders.local.join(given),
            file: file.into(),
        }),
        Err(source) => Err(mounts::Error::Archive {
            given: given.to_owned(),
            source,
        }),
    }
}

/// Combines the job's and the image's program by Docker's rules.
fn argv(options: &Task, image: &Image) -> Result<Vec<String>, Error> {
    let own: Vec<String> = options
        .command
        .iter()
        .chain(&options.args)
        .cloned()
        .collect();
    let (program, rest) = match (&options.entrypoint, own.is_empty()) {
        // In Docker, `[""]` means no entrypoint, and `[]` means not to use the image's.
        (Some(entrypoint), _) if entrypoint == &[""] => (Vec::new(), own),
        (Some(entrypoint), true) if entrypoint.is_empty() => (Vec::new(), image.command.clone()),
        (Some(entrypoint), _) => (entrypoint.clone(), own),
        (None, false) => (image.entrypoint.clone(), own),
        (None, true) => (image.entrypoint.clone(), image.command.clone()),
    };
    let argv: Vec<String> = program.into_iter().chain(rest).collect();
    if argv.first().is_none_or(String::is_empty) {
        return Err(Error::NoCommand {
            image: options.image.clone(),
        });
    }
    Ok(argv)
}

/// The job names the profile's file, as on Docker's command line; Docker's API takes its text.
fn embed_profile(option: &mut String) -> Result<(), Error> {
    let path = option
        .strip_prefix("seccomp=")
        .or_else(|| option.strip_prefix("seccomp:"));
    let Some(path) = path.filter(|path| *path != "unconfined" && !path.starts_with('{')) else {
        return Ok(());
    };
    let path = PathBuf::from(path);
    let wrong = |source| Error::Profile {
        path: path.clone(),
        source,
    };
    let mut text = String::new();
    // Reading a pipe or a device might block.
    if !fs::metadata(&path).map_err(wrong)?.is_file() {
        return Err(wrong(io::Error::other("it is not a file")));
    }
    fs::File::open(&path)
        .and_then(|file| file.take(MAX_PROFILE).read_to_string(&mut text))
        .map_err(wrong)?;
    let profile: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| wrong(error.into()))?;
    *option = format!("seccomp={profile}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// C058.
    #[test]
    fn a_seccomp_profile_is_read_from_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("profile.json");
        fs::write(&path, "{ \"defaultAction\":\n \"SCMP_ACT_ALLOW\" }").unwrap();
        let mut option = format!("seccomp={}", path.display());
        embed_profile(&mut option).unwrap();
        assert_eq!(option, "seccomp={\"defaultAction\":\"SCMP_ACT_ALLOW\"}");
        let mut unconfined = "seccomp=unconfined".to_owned();
        embed_profile(&mut unconfined).unwrap();
        assert_eq!(unconfined, "seccomp=unconfined");
        fs::write(&path, "no JSON").unwrap();
        let wrong = embed_profile(&mut format!("seccomp={}", path.display())).unwrap_err();
        assert!(wrong.to_string().contains("profile.json"), "{wrong}");
    }

    /// C081.
    #[test]
    fn what_of_an_images_program_holds_is_as_with_docker() {
        let image = Image {
            entrypoint: vec!["entry".into()],
            command: vec!["cmd".into()],
            ..Image::default()
        };
        let run = |options: serde_json::Value| {
            let mut task = crate::config::tests::plain(json!({})).unwrap();
            let strings = |name: &str| {
                options[name].as_array().map(|list| {
                    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
                    list.iter().map(text).collect::<Vec<_>>()
                })
            };
            task.entrypoint = strings("entrypoint");
            task.args = strings("args").unwrap_or_default();
            argv(&task, &image).map(|argv| argv.join(" "))
        };
        for (options, expected) in [
            (json!({}), "entry cmd"),
            (json!({ "args": ["a"] }), "entry a"),
            (json!({ "entrypoint": ["e"] }), "e"),
            (json!({ "entrypoint": ["e"], "args": ["a"] }), "e a"),
            (json!({ "entrypoint": [] }), "cmd"),
            (json!({ "entrypoint": [], "args": ["a"] }), "a"),
            (json!({ "entrypoint": [""], "args": ["a"] }), "a"),
        ] {
            assert_eq!(run(options).unwrap(), expected);
        }
        assert!(matches!(
            run(json!({ "entrypoint": [""] })),
            Err(Error::NoCommand { .. })
        ));
    }

    /// Row 9 of the users' jobs: what a device plugin of Nomad's asks for.
    #[test]
    fn devices_bring_their_variables_and_their_runtime() {
        let task = TaskConfig {
            device_env: [("NVIDIA_VISIBLE_DEVICES".to_owned(), "GPU-1".to_owned())].into(),
            ..TaskConfig::default()
        };
        let plain = |options| crate::config::tests::plain(options).unwrap();
        let plugin = Plugin::parse(&[]).unwrap();
        let own = plain(json!({ "port_map": [{ "my-port": 80 }] }));
        let env = env(&task, &own);
        assert_eq!(env["NVIDIA_VISIBLE_DEVICES"], "GPU-1");
        assert_eq!(env["NOMAD_PORT_my_port"], "80");
        assert_eq!(
            runtime(&task, &own, &plugin).unwrap().as_deref(),
            Some("nvidia")
        );
        let other = plain(json!({ "runtime": "runc" }));
        let refused = runtime(&task, &other, &plugin).unwrap_err();
        assert!(
            refused.to_string().starts_with("`runtime` is `runc`"),
            "{refused}"
        );
        let none = runtime(&TaskConfig::default(), &own, &plugin).unwrap();
        assert_eq!(none, None);
    }
}
