//! `polydev-init SOCKET [PORT]`: process 1 of a container, see the library. With a port, init
//! listens there for requests to the broker.
//! `polydev-init pause`: holds a network namespace until SIGTERM.

use std::{ffi::OsString, num::NonZeroU16, path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let port = |text: OsString| text.to_str()?.parse::<NonZeroU16>().ok();
    let (argument, port) = (args.next(), args.next().map(port));
    let (Some(argument), None, None | Some(Some(_))) = (argument, args.next(), port) else {
        eprintln!(
            "polydev-init {}: process 1 of a polydev container\n\
             usage: polydev-init SOCKET [PORT] | pause\n\
             nomad-driver-polydev starts it; it does nothing useful when started by hand.",
            env!("CARGO_PKG_VERSION")
        );
        return ExitCode::from(2);
    };
    let served = if argument == "pause" {
        polydev_init::pause().map(|()| 0)
    } else {
        polydev_init::run(&PathBuf::from(argument), port.flatten())
    };
    match served {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("polydev-init: {error}");
            ExitCode::FAILURE
        }
    }
}
