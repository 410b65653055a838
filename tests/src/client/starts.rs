//! The runs that tests start: commands and prompts, with or without a credential.

use std::collections::BTreeMap;

use bytes::Bytes;
use polydev_proto::runtime::{
    ApiKey, Argv, Credential, CredentialMode, Prompt, RunStart, Secret, credential,
    run_start::Command, secret,
};

/// A run of `argv` for the user `tester`.
#[must_use]
pub fn argv(provider: &str, argv: &[&str]) -> RunStart {
    let args = argv
        .iter()
        .map(|arg| Bytes::copy_from_slice(arg.as_bytes()))
        .collect();
    RunStart {
        command: Some(Command::Argv(Argv { args, text: vec![] })),
        // It may look at a credential that it has.
        credential_mode: CredentialMode::Inject.into(),
        ..start(provider)
    }
}

/// A run of `sh -c script`.
#[must_use]
pub fn shell(provider: &str, script: &str) -> RunStart {
    argv(provider, &["sh", "-c", script])
}

/// A prompt with a key. The CLI sends the prompt to the model API at `url`.
#[must_use]
pub fn prompt(provider: &str, text: &str, key: &str, url: &str) -> RunStart {
    let (variable, url) = match provider {
        "openai" => ("OPENAI_BASE_URL", format!("{url}/v1")),
        "anthropic" => ("ANTHROPIC_BASE_URL", url.to_owned()),
        "google" => ("GOOGLE_GEMINI_BASE_URL", url.to_owned()),
        other => panic!("no provider `{other}`"),
    };
    RunStart {
        command: Some(Command::Prompt(Prompt {
            text: text.into(),
            ..Prompt::default()
        })),
        env: BTreeMap::from([(variable.into(), url)]),
        credential: Some(api_key(key)),
        ..start(provider)
    }
}

/// An API key of the provider, in the clear.
#[must_use]
pub fn api_key(key: &str) -> Credential {
    let api_key = secret::Kind::ApiKey(ApiKey {
        key: key.into(),
        project_id: String::new(),
    });
    in_the_clear(api_key)
}

/// A credential in the clear.
#[must_use]
pub fn in_the_clear(kind: secret::Kind) -> Credential {
    let secret = Secret { kind: Some(kind) };
    Credential {
        source: Some(credential::Source::Secret(secret)),
    }
}

fn start(provider: &str) -> RunStart {
    RunStart {
        provider: provider.into(),
        user_id: "tester".into(),
        timeout: Some(prost_types::Duration {
            seconds: 120,
            nanos: 0,
        }),
        ..Default::default()
    }
}
