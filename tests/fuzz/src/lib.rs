//! Fuzz targets, each a program of `targets/`. `tests/fuzz/run.sh` builds and runs them.
