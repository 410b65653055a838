//! The image of the gate for tool calls, by the commands that its users know.

use std::{fs, os::unix::fs::PermissionsExt, process::Command};

use polydev_tests::{
    docker::{self, docker},
    folder::Folder,
    process::{output, succeed},
    program, root,
};

const IMAGE: &str = "pdtest-openai-runtime:local";
const TOKENS: [&str; 4] = [
    "-e",
    "MVAR_REQUIRE_EXECUTION_TOKEN=1",
    "-e",
    "MVAR_FAIL_CLOSED=1",
];
const SECRET: [&str; 2] = ["-e", "MVAR_EXEC_TOKEN_SECRET=change_me_in_prod"];

/// `docker run --rm`, hardened as a user would.
fn run(options: &[&str], command: &[&str]) -> (String, Option<i32>) {
    let mut run = docker::command();
    run.args([
        "run",
        "--rm",
        "--read-only",
        "--network",
        "none",
        "--cap-drop",
        "ALL",
    ]);
    run.args(TOKENS).args(options).arg(IMAGE).args(command);
    let done = output(&mut run);
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
    (text, done.status.code())
}

#[test]
fn the_commands_of_the_cookbook_end_as_it_says() {
    succeed(
        Command::new("containers/build.sh")
            .arg("tool-gate")
            .current_dir(root())
            .env("DOCKER", docker::command().get_program())
            .env("POLYDEV_TOOL_GATE", program("polydev-tool-gate")),
    );
    let dockerfile = "examples/deployment/openai_docker/Dockerfile";
    succeed(
        docker::command()
            .args(["build", "-f", dockerfile, "-t", IMAGE, "."])
            .current_dir(root()),
    );
    let config = docker(&["image", "inspect", "--format", "{{.Config.User}}", IMAGE]);
    assert_eq!(config.trim(), "1000:1000");

    let summary = |executed: usize, blocked: usize| {
        format!(
            "mvar_openai_docker_demo\ntotal_calls=2\nexecuted_calls={executed}\n\
             blocked_calls={blocked}\nstep_up_calls=0\n"
        )
    };
    assert_eq!(run(&SECRET, &[]), (summary(1, 1), Some(0)));
    assert_eq!(run(&[], &[]), (summary(0, 2), Some(3)));

    // One token in two containers that share a store.
    let folder = Folder::new("pdtest-gate-");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let volume = format!("{}:/var/mvar", folder.path().display());
    let shared = [
        &SECRET[..],
        &["-v", &volume, "-e", "MVAR_EXECUTION_TOKEN_ONE_TIME=1"],
        &["-e", "MVAR_EXECUTION_TOKEN_NONCE_PERSIST=1"],
        &[
            "-e",
            "MVAR_EXEC_TOKEN_NONCE_STORE=/var/mvar/consumed_nonces.jsonl",
        ],
    ]
    .concat();
    let probe = || run(&shared, &["polydev-tool-gate", "probe"]);
    let (first, second) = (probe(), probe());
    assert!(first.0.starts_with("nonce_probe=ALLOW\n"), "{first:?}");
    let used = "nonce_probe=BLOCK\nreason=Execution token invalid: it was used before\n";
    assert_eq!(second, (used.into(), Some(3)));
    docker(&["rmi", IMAGE]);
}
