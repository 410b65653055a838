//! The shim's process: see `polydev_shim::cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    polydev_shim::cli::main()
}
