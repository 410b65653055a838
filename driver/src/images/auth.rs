//! Credentials for a registry: from the task, else from the plugin's file, else from its
//! helper.

use std::{fs::File, io, path::PathBuf, time::Duration};

use docker_credential::{CredentialRetrievalError, DockerCredential, get_credential_from_reader};
use tokio::{task::spawn_blocking, time::timeout};

use super::Want;
use crate::{
    config,
    docker::{Credentials, TOKEN_USER},
};

/// A helper may contact a keychain or a cloud service.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);
/// Docker Hub's name in credential files.
const HUB: &str = "https://index.docker.io/v1/";

/// Why the plugin's credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the file `{path}` given in `auth.config`")]
    File { path: PathBuf, source: io::Error },
    #[error("`{origin}` has no usable credentials for `{server}`")]
    Credentials {
        origin: String,
        server: String,
        source: CredentialRetrievalError,
    },
    #[error("`{origin}` did not respond within {} s", HELPER_TIMEOUT.as_secs())]
    TimedOut { origin: String },
}

/// The credentials for an image's registry; `None` if there are none.
///
/// # Errors
/// [`Error`]; missing credentials are not an error.
pub(super) async fn find(
    want: &Want<'_>,
    plugin: &config::Auth,
) -> Result<Option<Credentials>, Error> {
    let server = server(want.reference);
    if let Some(auth) = want.auth {
        return Ok(Some(Credentials {
            username: auth.username.clone(),
            password: auth.password.clone(),
            server: auth.server_address.clone().or(Some(server)),
        }));
    }
    if let Some(path) = &plugin.config {
        let file = File::open(path).map_err(|source| Error::File {
            path: path.clone(),
            source,
        })?;
        if let Some(found) = ask(path.display().to_string(), file, server.clone()).await? {
            return Ok(Some(found));
        }
    }
    if let Some(helper) = &plugin.helper {
        let store = serde_json::json!({ "credsStore": helper }).to_string();
        let origin = format!("docker-credential-{helper}");
        return ask(origin, io::Cursor::new(store), server).await;
    }
    Ok(None)
}

/// Looks up `server` in a file in Docker's format, which may name a helper.
async fn ask(
    origin: String,
    file: impl io::Read + Send + 'static,
    server: String,
) -> Result<Option<Credentials>, Error> {
    let wanted = server.clone();
    let found = spawn_blocking(move || get_credential_from_reader(file, &wanted));
    let Ok(found) = timeout(HELPER_TIMEOUT, found).await else {
        return Err(Error::TimedOut { origin });
    };
    match found.expect("looking credentials up does not panic") {
        Ok(DockerCredential::UsernamePassword(username, password)) => Ok(Some(Credentials {
            username,
            password,
            server: Some(server),
        })),
        Ok(DockerCredential::IdentityToken(token)) => Ok(Some(Credentials {
            username: TOKEN_USER.into(),
            password: token,
            server: Some(server),
        })),
        Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(None),
        // The message of helpers that have no credentials.
        Err(CredentialRetrievalError::HelperFailure { stdout, .. })
            if stdout.contains("credentials not found") =>
        {
            Ok(None)
        }
        Err(source) => Err(Error::Credentials {
            origin,
            server,
            source,
        }),
    }
}

/// The registry of a reference, by its name in credential files.
fn server(reference: &str) -> String {
    match reference.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => match host {
            "docker.io" | "index.docker.io" => HUB.into(),
            host => host.into(),
        },
        _ => HUB.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C046: which credentials are used.
    #[tokio::test]
    async fn a_registrys_credentials_are_found_under_its_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let login = |name: &str| {
            use base64::Engine;
            let auth = base64::engine::general_purpose::STANDARD.encode(format!("{name}:secret"));
            serde_json::json!({ "auth": auth })
        };
        let file = serde_json::json!({ "auths": {
            HUB: login("hub"), "quay.io": login("quay"), "https://other.io/v1/": login("other"),
        }});
        std::fs::write(&path, file.to_string()).unwrap();
        let plugin = config::Auth {
            config: Some(path),
            helper: None,
        };
        for (image, user) in [
            ("redis", Some("hub")),
            ("a/redis:7", Some("hub")),
            ("quay.io/redis:7", Some("quay")),
            ("other.io/redis", Some("other")),
            ("nowhere.io/redis", None),
        ] {
            let want = Want {
                reference: image,
                policy: super::super::Policy::Always,
                archive: None,
                auth: None,
                auth_soft_fail: false,
                timeout: None,
            };
            let found = find(&want, &plugin).await.unwrap();
            assert_eq!(
                found.map(|found| found.username).as_deref(),
                user,
                "{image}"
            );
        }
    }
}
