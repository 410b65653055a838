//! How a plugin and its host recognise each other: a cookie in the environment, and one
//! line on stdout.

use std::{io, path::Path};

const COOKIE: &str = "NOMAD_PLUGIN_MAGIC_COOKIE";
const COOKIE_VALUE: &str = "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255";
/// Version of go-plugin's handshake, and of Nomad's plugin protocol over gRPC.
const CORE_VERSION: u32 = 1;
const APP_VERSION: u32 = 2;

/// Why the process has no host to serve.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(
        "this is a Nomad task driver plugin; a Nomad agent must start it.\n\
         Put it into the agent's plugin_dir and add to the agent's configuration:\n\n    \
         plugin \"nomad-driver-polydev\" {{}}\n\n\
         To try it without Nomad: polydev-shim dev"
    )]
    ByHand,
    #[error(
        "the host supports versions `{offered}` of Nomad's plugin protocol; this plugin requires version {APP_VERSION}"
    )]
    Version { offered: String },
}

/// Checks that a host has started this process.
///
/// # Errors
/// [`Error`], with a text for the person who started it.
pub fn check(variable: impl Fn(&str) -> Option<String>) -> Result<(), Error> {
    if variable(COOKIE).as_deref() != Some(COOKIE_VALUE) {
        return Err(Error::ByHand);
    }
    let offered = variable("PLUGIN_PROTOCOL_VERSIONS").unwrap_or_else(|| APP_VERSION.to_string());
    if offered
        .split(',')
        .any(|version| version.trim() == APP_VERSION.to_string())
    {
        Ok(())
    } else {
        Err(Error::Version { offered })
    }
}

/// Sends the host the plugin's address. Nothing else may be written to the host's stdout.
pub(super) fn announce(stdout: &mut impl io::Write, socket: &Path) -> io::Result<()> {
    writeln!(
        stdout,
        "{CORE_VERSION}|{APP_VERSION}|unix|{}|grpc",
        socket.display()
    )?;
    stdout.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handshake_is_one_line_of_five_fields() {
        let mut line = Vec::new();
        announce(&mut line, Path::new("/tmp/p.sock")).unwrap();
        assert_eq!(
            String::from_utf8(line).unwrap(),
            "1|2|unix|/tmp/p.sock|grpc\n"
        );
    }

    #[test]
    fn only_a_nomad_agent_is_served() {
        let agent = |versions: &'static str| {
            check(move |name| match name {
                COOKIE => Some(COOKIE_VALUE.to_owned()),
                "PLUGIN_PROTOCOL_VERSIONS" => Some(versions.to_owned()),
                _ => None,
            })
        };
        assert_eq!(agent("2"), Ok(()));
        assert_eq!(agent("1,2"), Ok(()));
        assert_eq!(
            agent("3"),
            Err(Error::Version {
                offered: "3".into()
            })
        );
        assert_eq!(check(|_| None), Err(Error::ByHand));
        assert_eq!(check(|_| Some("x".into())), Err(Error::ByHand));
    }
}
