#!/usr/bin/env bash
# clap_complete and a program with a dash in its name.
#
# Versions: clap_complete 4.6.11 and, to compare, 4.5.67, both with clap 4.6.7 (crates.io).
# Needs bash, cargo. Reported by others: clap-rs/clap#6421.
#
# A good guess: the bash completions of `my-program` offer the same as those of `myprogram`,
# and a newer minor version offers no less than the one before.
# Seen: with 4.6.11 a program with a dash gets no completions after a subcommand, while the
# subcommands themselves are offered. The generated script sets the state
# `polydev__shim__subcmd__list`, and then looks for `polydev__subcmd__shim__subcmd__list`.
# With 4.5.67 the options are offered.
#
# Where it matters: Cargo.toml holds clap_complete at `~4.5` for `polydev-shim completions`.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Generates the completions of a program of the given name with one subcommand.
for version in 4.6.11 4.5.67; do
    mkdir -p "$work/$version/src"
    cat >"$work/$version/Cargo.toml" <<TOML
[package]
name = "finding"
version = "0.0.0"
edition = "2021"

[dependencies]
clap = { version = "=4.6.7", features = ["string"] }
clap_complete = "=$version"
TOML
    cat >"$work/$version/src/main.rs" <<'RS'
use clap::{Arg, ArgAction, Command};

fn main() {
    let name = std::env::args().nth(1).expect("no name");
    let list = Command::new("list").arg(Arg::new("json").long("json").action(ArgAction::SetTrue));
    let mut command = Command::new(name.clone()).subcommand(list);
    let shell = clap_complete::Shell::Bash;
    clap_complete::generate(shell, &mut command, name, &mut std::io::stdout());
}
RS
    (cd "$work/$version" && CARGO_TARGET_DIR="$work/target" timeout 600 cargo build --quiet >&2)
    cp "$work/target/debug/finding" "$work/$version/generate"
done

# What bash offers after `NAME list --`.
cat >"$work/complete.sh" <<'SH'
name=$1
source /dev/stdin
function=$(complete -p "$name")
function=${function#*-F }
COMP_WORDS=("$name" list --)
COMP_CWORD=2
COMPREPLY=()
"${function%% *}" "$name" -- list
echo "${COMPREPLY[*]:-nothing}"
SH
offered() { "$work/$1/generate" "$2" | timeout 10 bash "$work/complete.sh" "$2"; }
seen="4.6.11: polydevshim $(offered 4.6.11 polydevshim), "
seen+="polydev-shim $(offered 4.6.11 polydev-shim); "
seen+="4.5.67: polydev-shim $(offered 4.5.67 polydev-shim)"
recorded="4.6.11: polydevshim --json --help, polydev-shim nothing; "
recorded+="4.5.67: polydev-shim --json --help"
echo "expected: --json --help in all three"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
