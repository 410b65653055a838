//! `docs/walk.md`, command by command.

use std::{fs, path::PathBuf};

use polydev_tests::{cluster::Cluster, nomad::nomad_program, process::output, program, root};
use wildmatch::WildMatch;

mod long {
    use super::*;

    #[test]
    fn the_walk_through_a_cluster_goes_as_it_is_written() {
        let cluster = Cluster::start();
        let folder = cluster.walk_folder();
        std::os::unix::fs::symlink(root().join("jobspecs"), folder.join("jobspecs")).unwrap();
        let text = fs::read_to_string(root().join("docs/walk.md")).unwrap();
        let steps: Vec<_> = text.split("```sh\n").skip(1).map(step).collect();
        // One shell for all steps. It prints a mark at the end of each step.
        let script: String = steps
            .iter()
            .map(|(commands, _)| format!("{commands}echo '--- end of step'\n"))
            .collect();
        let programs = [program("polydev-shim"), nomad_program()];
        let programs = programs.iter().filter_map(|program| program.parent());
        let path = std::env::var_os("PATH").unwrap();
        let path: Vec<PathBuf> = programs
            .map(PathBuf::from)
            .chain(std::env::split_paths(&path))
            .collect();
        let mut shell = cluster.inside();
        shell.args([
            "timeout",
            "--kill-after=5",
            "240",
            "bash",
            "-euo",
            "pipefail",
            "-c",
        ]);
        shell.arg(&script).current_dir(&folder);
        shell.env("PATH", std::env::join_paths(path).unwrap());
        let walked = output(&mut shell);
        let printed = String::from_utf8_lossy(&walked.stdout).into_owned();
        let told = String::from_utf8_lossy(&walked.stderr).into_owned();
        let mut printed_of = printed.split("--- end of step\n");
        for (commands, expected) in &steps {
            let printed = printed_of.next().unwrap_or_default();
            let mut lines = printed.lines();
            for line in expected.lines() {
                let is_it = WildMatch::new(line);
                let is_printed = lines.any(|printed| is_it.matches(printed));
                assert!(
                    is_printed,
                    "`{line}` is not what\n{commands}\nprints:\n{printed}\n{told}"
                );
            }
        }
        assert!(walked.status.success(), "{told}");
    }
}

/// The commands, and their output.
fn step(text: &str) -> (&str, &str) {
    let (commands, rest) = text.split_once("```\n").expect("a block ends");
    let expected = rest.strip_prefix("```text\n");
    let expected = expected.and_then(|expected| expected.split_once("```\n"));
    (commands, expected.map_or("", |(expected, _)| expected))
}
