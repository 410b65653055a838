//! `polydev-init SOCKET`: process 1 of a container, see the library.

use std::{path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let (Some(socket), None) = (args.next(), args.next()) else {
        eprintln!(
            "polydev-init {}: process 1 of a polydev container\n\
             usage: polydev-init SOCKET\n\
             It is started by nomad-driver-polydev and is of no use by hand.",
            env!("CARGO_PKG_VERSION")
        );
        return ExitCode::from(2);
    };
    match polydev_init::run(&PathBuf::from(socket)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("polydev-init: {error}");
            ExitCode::FAILURE
        }
    }
}
