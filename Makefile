# Everything there is to do, for people and for CI.

SHELL      := /bin/bash
POLYDEV_CACHE ?= $(HOME)/.cache/polydev
HOST       := $(shell uname -m)-unknown-linux-gnu
SUDO       := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env env PATH="$(PATH)" HOME="$(HOME)")
export POLYDEV_CACHE MAKECMDGOALS

.PHONY: help demo test test-long bench chaos build release images lint fmt deny advisories proto-lint unit fuzz it long agent clean-all

help:          ## Show this.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | column -t -s '	'

demo: release  ## Run a real CLI warm on this machine, with Docker alone.
	@$(SUDO) tests/demo.sh

test:          ## Check and test everything, real Nomad included.
	@tests/test.sh

test-long:     ## The tests that take minutes each, and Nomad 1.10.
	@tests/test.sh long

bench: release ## Measure, print and write target/bench/results.json.
	@$(SUDO) tests/bench.sh $(PARTS)

chaos: release ## Kill parts under load: MINUTES=10, SEED to repeat one.
	@$(SUDO) tests/chaos.sh --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

build: tools init ## Build all programs for tests.
	cargo build --locked --workspace --exclude polydev-init
	@cp target/$(HOST)/init/polydev-init target/debug/

release: tools init ## Build all programs for use.
	cargo build --locked --release --workspace --exclude polydev-init
	@cp target/$(HOST)/init/polydev-init target/release/

.PHONY: tools init
tools:
	@. tests/lib.sh && need cargo "install Rust, see https://rustup.rs" && need cc "apt-get install gcc"

init:          ## Build polydev-init, static.
	RUSTFLAGS="-C target-feature=+crt-static" \
	    cargo build --locked --profile init --package polydev-init --target $(HOST)

images:        ## Build the runtime images.
	@$(SUDO) tests/with-docker.sh tests/images.sh

fmt:           ## Format the code.
	cargo fmt --all

lint:          ## Formatting and clippy, warnings denied.
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- --deny warnings

deny:          ## Licences, sources and bans of the dependencies.
	cargo deny --locked check bans licenses sources

advisories:    ## Known vulnerabilities of the dependencies; needs the network.
	cargo deny --locked check advisories

proto-lint:    ## buf lint of our protocols.
	cd proto && buf lint

unit:          ## Tests that need neither root nor a daemon.
	cargo test --locked --workspace --exclude polydev-tests

fuzz:          ## Fuzz what reads bytes from outside: SECONDS=20 for each target.
	tests/fuzz/run.sh $(or $(SECONDS),20)

it: init       ## Tests of the whole system: root, Docker, Nomad, images.
	@cp target/$(HOST)/init/polydev-init target/debug/ # cargo test has put another there.
	cargo test --locked --package polydev-tests -- --test-threads=1 --skip long::

long: init
	@cp target/$(HOST)/init/polydev-init target/debug/
	cargo test --locked --package polydev-tests -- --test-threads=1 long::

agent: init    # Those of the tests that have a Nomad agent.
	@cp target/$(HOST)/init/polydev-init target/debug/
	cargo test --locked --package polydev-tests -- --test-threads=1 --skip long:: \
	    corners:: exec:: faults:: jobspecs:: network:: nomad:: on_demand:: output:: plain:: pools:: refusals:: registry:: rolls:: \
	    survive::a_killed survive::an_agent

clean-all:     ## Remove what demo, test and bench left: target, cache, images.
	@$(SUDO) tests/with-docker.sh tests/clean-all.sh
