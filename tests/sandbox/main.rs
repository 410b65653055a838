//! The image of the Python sandbox with `docker run`, as the guide of the systems before this one
//! has it:
//!
//! ```text
//! DEEPRESEARCH_SANDBOX_TESTS=1 DEEPRESEARCH_SANDBOX_IMAGE=deepresearch-python-sandbox:latest \
//!     cargo test -p polydev-tests --test sandbox -- --ignored --nocapture
//! ```
//!
//! The test is never ignored: without its image or Docker it fails. A harness of its own, because
//! with `--ignored` the usual one would run nothing, and pass.

use std::{
    error::Error,
    fs,
    os::unix::fs::{PermissionsExt, chown},
    process::{Command, ExitCode},
};

use libtest_mimic::{Arguments, Failed, Trial};
use polydev_tests::{docker, process::output, root};

const IMAGE: &str = "polydev-python-sandbox:latest";
/// The user of the image.
const USER: u32 = 1000;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.ignored &= arguments.list;
    let draws = Trial::test("the_image_draws_with_all_that_it_has", || {
        draws().map_err(|error| Failed::from(error.to_string()))
    });
    libtest_mimic::run(&arguments, vec![draws]).exit_code()
}

fn docker() -> Command {
    match std::env::var_os("DEEPRESEARCH_DOCKER_BIN") {
        Some(program) => Command::new(program),
        None => docker::command(),
    }
}

fn draws() -> Result<(), Box<dyn Error>> {
    let image = std::env::var("DEEPRESEARCH_SANDBOX_IMAGE").unwrap_or_else(|_| IMAGE.into());
    let found = output(docker().args(["image", "inspect", &image]));
    if !found.status.success() {
        let why = String::from_utf8_lossy(&found.stderr);
        return Err(format!(
            "{why}there is no image `{image}`. Build it in the project's top folder: \
             docker build -t {image} -f containers/python-sandbox/Dockerfile ."
        )
        .into());
    }
    let workspace = tempfile::tempdir()?;
    fs::set_permissions(workspace.path(), fs::Permissions::from_mode(0o777))?;
    fs::copy(
        root().join("tests/sandbox/smoke.py"),
        workspace.path().join("smoke.py"),
    )?;
    // Ours alone where that is possible: without root, everyone may write to it.
    let _not_root = chown(workspace.path(), Some(USER), Some(USER));
    // The limits of a slot, or stricter ones. Whatever becomes of the client, the container ends.
    let name = format!("polydev-sandbox-{}", std::process::id());
    let mut run = Command::new("timeout");
    run.arg("100").arg(docker().get_program());
    run.args([
        "run",
        "--rm",
        "--name",
        &name,
        "--network=none",
        "--memory=2g",
        "--memory-swap=2g",
    ])
    .args([
        "--cpus=2",
        "--pids-limit=256",
        "--cap-drop=ALL",
        "--read-only",
    ])
    .args([
        "--security-opt=no-new-privileges",
        "--tmpfs=/tmp:noexec,size=128m",
    ])
    .args(["--tmpfs=/run:noexec,size=16m"])
    .arg(format!(
        "--tmpfs=/home/runtime:exec,size=128m,uid={USER},gid={USER}"
    ))
    .arg(format!(
        "--mount=type=bind,source={},target=/workspace",
        workspace.path().display()
    ))
    .args([&image, "python", "/workspace/smoke.py"]);
    let ran = output(&mut run);
    output(docker().args(["rm", "--force", &name]));
    let (stdout, stderr) = (
        String::from_utf8_lossy(&ran.stdout),
        String::from_utf8_lossy(&ran.stderr),
    );
    if !ran.status.success() || stdout != "drawn\n" {
        return Err(format!("{}\n{stdout}{stderr}", ran.status).into());
    }
    for (name, begins) in [
        ("plot.png", "\u{fffd}PNG"),
        ("plot.pdf", "%PDF"),
        ("graph.svg", "<?xml"),
        ("flow.svg", "<svg"),
    ] {
        let path = workspace.path().join(name);
        if !fs::symlink_metadata(&path)?.is_file() {
            return Err(format!("`{name}` is no file").into());
        }
        let content = fs::read(&path)?;
        let text = String::from_utf8_lossy(&content);
        let is_drawn = !name.ends_with(".svg") || text.contains("<svg");
        if !text.starts_with(begins) || !is_drawn {
            let beginning: String = text.chars().take(100).collect();
            return Err(format!("`{name}` begins with {beginning:?}").into());
        }
    }
    Ok(())
}
