//! A caller's run, checked before any driver is asked.

mod command;
mod credential;
pub mod facts;
mod files;
mod times;

pub use files::Own;
pub use times::MAX_RUN_TIME;
pub(super) use times::{MIN_TIME, bounded, queue_timeout};

use std::{sync::Arc, time::Duration};

use polydev_proto::{
    exec,
    id::{RunId, UserId},
    node::{RunSpec, TraceContext},
    prompt,
    provider::{NoVendor, Provider, Unknown, Vendor},
    runtime::{CredentialMode, RunStart, SlowReader},
    workspace,
};
use secrecy::ExposeSecret;
use sha2::{Digest, Sha256};

use command::Asked;
use credential::{credential_of, mode};
use files::{files, own_input, rules, terminal};
use times::TELL_TIMEOUT;

use super::terms::Terms;
use crate::{
    access::Policy,
    approval::wanted::{Wanted, Who},
    credentials::Source,
    environment,
    permission::Permission,
    provider::Cli,
    secret::{self, Prepared},
};

/// The kernel's `PATH_MAX`.
const MAX_PATH: usize = 4096;
const MAX_USER_ID: usize = 128;

/// A checked run.
#[derive(Debug)]
pub struct Request {
    pub provider: Provider,
    pub user_id: UserId,
    /// Who asks.
    pub caller: Who,
    pub run_id: RunId,
    /// Whether the run gets only the slot that is leased for it.
    pub is_leased: bool,
    /// Whether another try of the run may have run.
    pub is_retry: bool,
    pub attempt: u64,
    pub accept_duplicate: bool,
    /// How long the run may wait for a slot.
    pub queue_timeout: Duration,
    pub spec: RunSpec,
    /// How many bytes of the run's input are files.
    pub files_bytes: u64,
    /// Input that came with the start message: files, and a prompt that is too long for an
    /// argument.
    pub own_input: Option<Own>,
    /// Where the credential is during the run. Unspecified: outside of the container if it can be.
    pub mode: CredentialMode,
    /// The named credential and whose it is, until the run is [equipped](Self::equip) with it.
    pub credential: Option<(Vendor, Source)>,
    pub secrets: Prepared,
    /// What the caller's role says.
    pub role: Arc<Policy>,
    /// What somebody must approve before the run has a slot.
    pub wanted: Option<Wanted>,
    /// Who signs what was allowed. `None` if nobody does.
    pub permission: Option<Permission>,
    pub trace: Option<TraceContext>,
}

/// Why a run is refused, with the field of the start message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    #[error("`start` must be the first message of a run, and must come only once")]
    NotStarted,
    #[error(transparent)]
    Provider(#[from] Unknown),
    #[error(transparent)]
    NoVendor(#[from] NoVendor),
    #[error(transparent)]
    Credential(#[from] secret::Invalid),
    #[error(transparent)]
    Environment(#[from] environment::Refused),
    #[error(transparent)]
    Prompt(#[from] prompt::Invalid),
    #[error(
        "`prompt.conversation` is `true`; must be false, because an agent cannot have the run: {reason}"
    )]
    Conversation { reason: String },
    #[error(transparent)]
    Command(#[from] exec::Invalid),
    #[error("`{field}` is `{given}`; must be {allowed}")]
    Value {
        field: &'static str,
        given: String,
        allowed: &'static str,
    },
}

impl Invalid {
    /// The field, as it is named in the message.
    #[must_use]
    pub fn field(&self) -> String {
        match self {
            Self::NotStarted => "start".into(),
            Self::Provider(_) | Self::NoVendor(_) => "provider".into(),
            Self::Credential(invalid) => format!("credential.{}", invalid.field),
            Self::Environment(refused) => format!("env[{:?}]", refused.name),
            Self::Prompt(invalid) => invalid.field.into(),
            Self::Conversation { .. } => "prompt.conversation".into(),
            Self::Command(invalid) => invalid.field.clone(),
            Self::Value { field, .. } => (*field).into(),
        }
    }
}

/// Checks the id of a user.
///
/// # Errors
/// [`Invalid::Value`]
pub fn parse_user(user_id: String) -> Result<UserId, Invalid> {
    let is_short = (1..=MAX_USER_ID).contains(&user_id.len());
    if is_short && !user_id.chars().any(char::is_control) {
        return Ok(user_id.into());
    }
    Err(Invalid::Value {
        field: "user_id",
        given: user_id,
        allowed: "1 to 128 bytes without control characters",
    })
}

/// Checks a run's id, in any spelling of a UUID.
///
/// # Errors
/// [`Invalid::Value`]
pub fn parse_id(field: &'static str, run_id: &str) -> Result<RunId, Invalid> {
    run_id.parse().map_err(|_| Invalid::Value {
        field,
        given: run_id.to_owned(),
        allowed: "a UUIDv7",
    })
}

/// The run's id, and whether it is the id of a lease.
fn ids(start: &RunStart) -> Result<(RunId, bool), Invalid> {
    match (start.run_id.as_str(), start.lease_id.as_str()) {
        ("", "") => Ok((RunId::now(), false)),
        (given, "") => Ok((parse_id("run_id", given)?, false)),
        ("", lease) => Ok((parse_id("lease_id", lease)?, true)),
        (given, lease) if given == lease => Ok((parse_id("lease_id", lease)?, true)),
        (given, _) => Err(Invalid::Value {
            field: "run_id",
            given: given.to_owned(),
            allowed: "empty, or the same as `lease_id`",
        }),
    }
}

fn drops_oldest(on_slow_reader: i32) -> Result<bool, Invalid> {
    match SlowReader::try_from(on_slow_reader) {
        Ok(on_slow_reader) => Ok(on_slow_reader == SlowReader::DropOldest),
        Err(unknown) => Err(Invalid::Value {
            field: "on_slow_reader",
            given: unknown.to_string(),
            allowed: "SLOW_READER_BLOCK or SLOW_READER_DROP_OLDEST",
        }),
    }
}

fn check_work_dir(given: &str) -> Result<(), Invalid> {
    let is_absolute = given.is_empty() || given.starts_with('/');
    if is_absolute && given.len() <= MAX_PATH {
        return Ok(());
    }
    Err(Invalid::Value {
        field: "work_dir",
        given: given.to_owned(),
        allowed: "an absolute path of at most 4096 bytes",
    })
}

impl Request {
    /// # Errors
    /// [`Invalid`] for the first field that is wrong.
    pub fn parse(mut start: RunStart, trace: Option<TraceContext>) -> Result<Self, Invalid> {
        let provider: Provider = start.provider.parse()?;
        let user_id = parse_user(std::mem::take(&mut start.user_id))?;
        let (run_id, is_leased) = ids(&start)?;
        let is_retry = !start.run_id.is_empty() && start.attempt != 1;
        let drop_oldest = drops_oldest(start.on_slow_reader)?;
        check_work_dir(&start.work_dir)?;
        let queue_timeout = times::queue_timeout(start.queue_timeout)?;
        environment::check(&start.env)?;
        let Asked {
            argv,
            stdin,
            files: mut settings,
            prompt,
        } = command::read(provider, &mut start)?;
        let server = provider.vendor().ok().and_then(|vendor| {
            let url = start.env.get(vendor.base_url())?;
            settings.extend(vendor.server_file(url));
            Some(url.as_str())
        });
        if stdin.is_some() && start.stdin {
            return Err(Invalid::Value {
                field: "stdin",
                given: "true".into(),
                allowed: "false, because a prompt of this length is the command's stdin",
            });
        }
        let (files, contents) = files(std::mem::take(&mut start.files))?;
        let files_bytes = workspace::check_files(&files)?;
        let own_input = own_input(contents, files_bytes, stdin.clone(), start.stdin);
        let artifacts = start.artifacts.take().map(rules).transpose()?;
        let terminal = start.terminal.take().map(terminal).transpose()?;
        if terminal.is_some() && stdin.is_some() {
            return Err(Invalid::Value {
                field: "terminal",
                given: "set".into(),
                allowed: "absent, because a prompt of this length is the command's stdin",
            });
        }
        let in_workspace = start.work_dir.is_empty()
            && (prompt.is_some() || !files.is_empty() || artifacts.is_some());
        let credential = start.credential.take();
        let credential = credential.map(|given| credential_of(provider, given));
        let credential = credential.transpose()?;
        let mode = mode(start.credential_mode, server)?;
        let max_api_wait = times::max_api_wait(start.max_api_wait)?;
        if max_api_wait.is_some() && (credential.is_none() || mode == CredentialMode::Inject) {
            return Err(Invalid::Value {
                field: "max_api_wait",
                given: "set".into(),
                allowed: "absent, because the run has no key outside of its container",
            });
        }
        let mut env = std::mem::take(&mut start.env);
        env.insert("PROVIDER".into(), provider.name().into());
        env.insert("USER_ID".into(), user_id.clone().into());
        let spec = RunSpec {
            argv,
            env,
            work_dir: match in_workspace {
                true => workspace::PATH.into(),
                false => start.work_dir,
            },
            stdin: start.stdin || stdin.is_some(),
            timeout: times::timeout(start.timeout, provider)?.try_into().ok(),
            kill_timeout: times::kill_timeout(start.kill_timeout)?.try_into().ok(),
            drop_oldest,
            secret_names: Vec::new(),
            terminal,
            files,
            artifacts,
            input_sha256: own_input
                .as_ref()
                .map(|own| Sha256::digest(&own.bytes).to_vec().into())
                .unwrap_or_default(),
            max_api_wait,
            prompt,
            input_from: own_input.as_ref().map_or(0, |own| own.from),
            input_bytes: own_input.as_ref().map_or(0, |own| own.bytes.len() as u64),
        };
        let mut request = Self {
            provider,
            user_id,
            caller: Who::default(),
            run_id,
            is_leased,
            is_retry,
            attempt: start.attempt.into(),
            accept_duplicate: start.accept_duplicate,
            queue_timeout,
            spec,
            files_bytes,
            own_input,
            mode,
            credential,
            secrets: Prepared::default(),
            role: Arc::default(),
            wanted: None,
            permission: None,
            trace,
        };
        let settings = Prepared {
            files: settings,
            ..Prepared::default()
        };
        request.hold(settings)?;
        Ok(request)
    }

    /// Gives the run the credential that it names.
    ///
    /// # Errors
    /// [`Invalid`] if the credential sets a variable that the caller sets too, or if the command
    /// does not fit beside it.
    pub fn equip(&mut self, mut secrets: Prepared) -> Result<(), Invalid> {
        if let Some((name, _)) =
            (secrets.env.iter()).find(|(name, _)| self.spec.env.contains_key(name))
        {
            return Err(Invalid::Environment(environment::Refused {
                name: name.clone(),
                reason: "cannot be set: the credential sets it",
            }));
        }
        command::has_key(&mut self.spec, secrets.outside.is_some())?;
        secrets.files.append(&mut self.secrets.files);
        self.hold(secrets)
    }

    fn hold(&mut self, secrets: Prepared) -> Result<(), Invalid> {
        check(&self.spec, &secrets)?;
        self.spec.secret_names = secrets.names().map(str::to_owned).collect();
        self.secrets = secrets;
        Ok(())
    }

    /// What holds for the run by its caller's role.
    #[must_use]
    pub fn terms(&self) -> Terms {
        Terms {
            role: self.role.clone(),
            user_id: self.user_id.clone(),
            has_outside_key: self.secrets.outside.is_some(),
        }
    }

    /// How long it may take until the run's end is reported.
    #[must_use]
    pub fn longest(&self) -> Duration {
        let of = |given: Option<prost_types::Duration>| {
            given
                .and_then(|given| Duration::try_from(given).ok())
                .unwrap_or_default()
        };
        of(self.spec.timeout) + of(self.spec.kill_timeout) + TELL_TIMEOUT
    }
}

/// Checks whether the kernel accepts the command.
fn check(spec: &RunSpec, secrets: &Prepared) -> Result<(), Invalid> {
    let plain = spec
        .env
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()));
    let secret = secrets.env.iter();
    let secret = secret.map(|(name, value)| (name.as_str(), value.expose_secret()));
    exec::check(spec.argv.iter().map(|arg| &arg[..]), plain.chain(secret))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Credential;
    use bytes::Bytes;
    use polydev_proto::runtime::{self, Argv, run_start::Command};

    fn start() -> RunStart {
        RunStart {
            provider: "anthropic".into(),
            user_id: "alice".into(),
            command: Some(Command::Argv(Argv {
                args: vec!["true".into()],
                text: vec![],
            })),
            ..Default::default()
        }
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut RunStart), field: &str) {
        let mut start = start();
        change(&mut start);
        let error = Request::parse(start, None).unwrap_err();
        let (words, name) = (error.to_string(), error.field());
        assert!(words.starts_with(&format!("`{field}")), "{words}");
        assert!(words.starts_with(&format!("`{name}`")), "{words}: {name}");
    }

    #[test]
    fn every_wrong_field_is_refused_by_name() {
        let argv = |args: &[&'static [u8]]| {
            let args = args.iter().map(|arg| Bytes::from_static(arg)).collect();
            Some(Command::Argv(Argv { args, text: vec![] }))
        };
        let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
        refused(
            |run| run.provider = "codecs".into(),
            "provider` is `codecs`",
        );
        refused(|run| run.user_id = String::new(), "user_id");
        refused(|run| run.user_id = "a\nb".into(), "user_id");
        refused(|run| run.run_id = "42".into(), "run_id");
        refused(|run| run.run_id = uuid::Uuid::new_v4().into(), "run_id");
        refused(|run| run.on_slow_reader = 7, "on_slow_reader");
        refused(|run| run.command = None, "command");
        refused(|run| run.command = argv(&[]), "argv");
        refused(|run| run.command = argv(&[b"sh", b"a\0"]), "argv[1]");
        refused(
            |run| drop(run.env.insert("LD_PRELOAD".into(), "x".into())),
            "env",
        );
        refused(|run| drop(run.env.insert("A=B".into(), "x".into())), "env");
        refused(|run| run.work_dir = "relative".into(), "work_dir");
        refused(|run| run.work_dir = "/long".repeat(1000), "work_dir");
        refused(|run| run.timeout = seconds(0), "timeout");
        refused(|run| run.timeout = seconds(-1), "timeout");
        refused(|run| run.timeout = seconds(90_000), "timeout");
        refused(|run| run.kill_timeout = seconds(31), "kill_timeout");
        refused(|run| run.queue_timeout = seconds(1801), "queue_timeout");
        refused(|run| run.max_api_wait = seconds(0), "max_api_wait` is `0s`");
        refused(
            |run| run.max_api_wait = seconds(5),
            "max_api_wait` is `set`",
        );
        refused(
            |run| run.credential = Some(runtime::Credential::default()),
            "credential.source",
        );
    }

    #[test]
    fn credentials_are_kept_apart_from_what_may_be_seen() {
        let mut request = Request::parse(start(), None).unwrap();
        let credential = Credential::ApiKey {
            key: "k".into(),
            project_id: None,
        };
        let secrets = Vendor::Anthropic.prepare(&credential).unwrap();
        request.equip(secrets).unwrap();
        let (name, key) = &request.secrets.env[0];
        assert_eq!(
            (name.as_str(), key.expose_secret()),
            ("ANTHROPIC_API_KEY", "k")
        );
        assert_eq!(request.spec.secret_names, ["ANTHROPIC_API_KEY"]);
        assert!(!request.spec.env.contains_key("ANTHROPIC_API_KEY"));
        assert_eq!(request.spec.env["USER_ID"], "alice");
        assert_eq!(request.spec.timeout.unwrap().seconds, 600);
        assert_eq!(request.spec.kill_timeout.unwrap().seconds, 30);
    }

    #[test]
    fn a_server_that_codex_finds_in_a_file_may_be_the_callers_or_the_credentials() {
        let variables = || {
            [(
                "OPENAI_BASE_URL".to_owned(),
                "https://gateway.example".into(),
            )]
        };
        let codex = || RunStart {
            provider: "openai".into(),
            ..start()
        };
        let names = |request: &Request| request.spec.secret_names.join(" ");
        let mut own = codex();
        own.env = variables().into();
        let request = Request::parse(own, None).unwrap();
        assert_eq!(names(&request), ".codex/config.toml");
        let mut request = Request::parse(codex(), None).unwrap();
        let variables = variables().map(|(name, url)| (name, url.into()));
        let credential = Credential::Environment(variables.into());
        let secrets = Vendor::OpenAi.prepare(&credential).unwrap();
        request.equip(secrets).unwrap();
        assert_eq!(names(&request), "OPENAI_BASE_URL .codex/config.toml");
    }

    #[test]
    fn what_a_credential_sets_is_not_the_callers_as_well() {
        let mut start = start();
        start.env.insert("TOKEN".into(), "x".into());
        let mut request = Request::parse(start, None).unwrap();
        let variables = [("TOKEN".to_owned(), "secret".into())].into();
        let credential = Credential::Environment(variables);
        let secrets = Vendor::Anthropic.prepare(&credential).unwrap();
        let refused = request.equip(secrets).unwrap_err();
        assert_eq!(refused.field(), "env[\"TOKEN\"]");
    }
}
