//! `polydev-init SOCKET [PORT]`: process 1 of a container, see the library. With a port, init
//! listens there for requests to the broker.
//! `polydev-init pause`: holds a network namespace until SIGTERM.
//! `polydev-init agent VENDOR [asks]`: a CLI that waits for a prompt, see polydev-agent. With `asks`,
//! each call of a tool waits for an answer.

use std::{ffi::OsString, num::NonZeroU16, path::PathBuf, process::ExitCode};

use polydev_proto::provider::Vendor;

fn main() -> ExitCode {
    let given: Vec<OsString> = std::env::args_os().skip(1).collect();
    let Some(wanted) = wanted(&given) else {
        eprintln!(
            "polydev-init {}: process 1 of a polydev container\n\
             usage: polydev-init SOCKET [PORT] | pause | agent VENDOR [asks]\n\
             nomad-driver-polydev starts it; it does nothing useful when started by hand.",
            env!("CARGO_PKG_VERSION")
        );
        return ExitCode::from(2);
    };
    let served = match wanted {
        Wanted::Agent(provider, asks) => Ok(polydev_agent::run(provider, asks)),
        Wanted::Pause => polydev_init::pause().map(|()| 0),
        Wanted::Init(socket, port) => polydev_init::run(&socket, port),
    };
    match served {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("polydev-init: {error}");
            ExitCode::FAILURE
        }
    }
}

enum Wanted {
    Agent(Vendor, bool),
    Pause,
    Init(PathBuf, Option<NonZeroU16>),
}

/// What the arguments ask for; `None` if they make no sense.
fn wanted(given: &[OsString]) -> Option<Wanted> {
    match given {
        [first] if first == "pause" => Some(Wanted::Pause),
        [first, name] if first == "agent" => {
            Vendor::named(name.to_str()?).map(|vendor| Wanted::Agent(vendor, false))
        }
        [first, name, asks] if first == "agent" && asks == "asks" => {
            Vendor::named(name.to_str()?).map(|vendor| Wanted::Agent(vendor, true))
        }
        [socket] => Some(Wanted::Init(socket.into(), None)),
        [socket, port] => Some(Wanted::Init(
            socket.into(),
            Some(port.to_str()?.parse().ok()?),
        )),
        _ => None,
    }
}
