//! What a policy is asked about a run.

use polydev_policy::rules::{Kind, RunFacts};
use polydev_proto::runtime::{Argv, Prompt, RunStart, Tools, run_start::Command};

use super::Request;
use crate::access::Caller;

/// What the start message alone has: the command or prompt as the caller has written it.
#[must_use]
pub fn asked(start: &RunStart) -> RunFacts {
    let mut facts = RunFacts {
        caller: String::new(),
        caller_user: None,
        user: String::new(),
        provider: String::new(),
        kind: Kind::Command,
        argv: Vec::new(),
        prompt: String::new(),
        system: String::new(),
        model: String::new(),
        tools: String::new(),
        conversation: false,
        trusts_files: false,
        stdin: start.stdin,
        terminal: start.terminal.is_some(),
        env: start.env.keys().cloned().collect(),
        work_dir: start.work_dir.clone(),
        files: start.files.iter().map(|file| file.path.clone()).collect(),
        file_bytes: 0,
        timeout_seconds: 0,
        credential: String::new(),
        egress_listed: false,
        egress: Vec::new(),
    };
    facts.env.sort_unstable();
    match &start.command {
        Some(Command::Argv(Argv { args, text })) => {
            let args = args
                .iter()
                .map(|word| String::from_utf8_lossy(word).into_owned());
            facts.argv = args.chain(text.iter().cloned()).collect();
        }
        Some(Command::Prompt(prompt)) => {
            let Prompt {
                text,
                model,
                conversation,
                system,
                tools,
                trust_files,
            } = prompt;
            facts.kind = Kind::Prompt;
            facts.trusts_files = *trust_files;
            facts.conversation = *conversation;
            facts.prompt.clone_from(text);
            facts.system.clone_from(system);
            facts.model.clone_from(model);
            facts.tools = match Tools::try_from(*tools) {
                Ok(Tools::None) => "none",
                Ok(Tools::Read) => "read",
                Ok(Tools::All) => "all",
                Ok(Tools::Unspecified) | Err(_) => "",
            }
            .into();
        }
        None => {}
    }
    facts
}

impl Request {
    /// All facts, once the run is [equipped](Self::equip) with the credential that it names.
    #[must_use]
    pub fn facts(&self, asked: RunFacts, caller: &Caller, has_credential: bool) -> RunFacts {
        let timeout = self.spec.timeout.map_or(0, |timeout| timeout.seconds);
        RunFacts {
            caller: caller.name.clone(),
            caller_user: caller.user.clone(),
            user: self.user_id.to_string(),
            provider: self.provider.name().into(),
            file_bytes: self.files_bytes,
            timeout_seconds: timeout.try_into().unwrap_or_default(),
            credential: match (&self.secrets.outside, has_credential) {
                (Some(_), _) => "broker",
                (None, true) => "container",
                (None, false) => "none",
            }
            .into(),
            egress_listed: self.role.egress().is_some(),
            egress: self.role.egress().unwrap_or_default().to_vec(),
            ..asked
        }
    }
}
