#!/bin/bash
# rustc for the workspace's own crates, with the counters that libFuzzer steers by.
# Dependencies and build scripts are compiled as ever.
rustc=$1
shift
case " $* " in
    *" --crate-name build_script_build "*) exec "$rustc" "$@" ;;
esac
exec "$rustc" "$@" -C passes=sancov-module \
    -C llvm-args=-sanitizer-coverage-level=4 \
    -C llvm-args=-sanitizer-coverage-inline-8bit-counters \
    -C llvm-args=-sanitizer-coverage-pc-table \
    -C llvm-args=-sanitizer-coverage-trace-compares
