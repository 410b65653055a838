//! `polydev-init SOCKET`: process 1 of a container, see the library.
//! `polydev-init pause`: holds a network namespace until SIGTERM.

use std::{path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let (Some(argument), None) = (args.next(), args.next()) else {
        eprintln!(
            "polydev-init {}: process 1 of a polydev container\n\
             usage: polydev-init SOCKET | pause\n\
             nomad-driver-polydev starts it; it does nothing useful when started by hand.",
            env!("CARGO_PKG_VERSION")
        );
        return ExitCode::from(2);
    };
    let served = if argument == "pause" {
        polydev_init::pause().map(|()| 0)
    } else {
        polydev_init::run(&PathBuf::from(argument))
    };
    match served {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("polydev-init: {error}");
            ExitCode::FAILURE
        }
    }
}
