# Everything there is to do, for people and for CI.

SHELL      := /bin/bash
POLYDEV_CACHE ?= $(HOME)/.cache/polydev
HOST       := $(shell uname -m)-unknown-linux-gnu
SUDO       := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env env PATH="$(PATH)" HOME="$(HOME)")
# The programs that tests start: of this build, and init as it is shipped.
POLYDEV_BIN := $(CURDIR)/target/under-test
export POLYDEV_CACHE POLYDEV_BIN MAKECMDGOALS
# These measure programs for use, not programs for tests.
bench chaos: POLYDEV_BIN := $(CURDIR)/target/release

.PHONY: help demo check docker nomad test test-long bench chaos launch-gate trilogy build release images fmt lint arm64 doc scripts deny advisories proto-lint proto-breaking unit fuzz it long agent clean-all

help:          ## Show this.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | column -t -s '	'

# The images are made while the programs are: that is mostly waiting for downloads. The demo is
# about the CLIs.
CLIS := openai-runtime anthropic-runtime google-runtime
demo: tools    ## Run a real CLI warm on this machine, with Docker alone.
	@$(SUDO) true
	@log=$$(mktemp); $(SUDO) tests/with-docker.sh tests/images.sh $(CLIS) >$$log 2>&1 & images=$$!; \
	    $(MAKE) --no-print-directory demo-programs && wait $$images || { cat $$log; exit 1; }; rm -f $$log
	@$(SUDO) tests/demo.sh

.PHONY: demo-programs
demo-programs:
	RUSTFLAGS="-C target-feature=+crt-static" \
	    cargo build --locked --profile demo --package polydev-init --target $(HOST)
	cargo build --locked --profile demo --package polydev-driver --package polydev-broker --package polydev-shim --package polydev-stand-in
	@cp target/$(HOST)/demo/polydev-init target/demo/

check:         ## What needs neither root nor Docker: two minutes, once it is built.
	@tests/test.sh check

docker:        ## The tests that need Docker, and no Nomad.
	@tests/test.sh docker

nomad:         ## The tests that have a Nomad agent.
	@tests/test.sh nomad

test:          ## Check and test everything, real Nomad included.
	@tests/test.sh

test-long:     ## The tests that take minutes each, and Nomad 1.10.
	@tests/test.sh long

bench: release ## Measure, print and write target/bench/results.json.
	@$(SUDO) tests/bench.sh $(PARTS)

chaos: release ## Kill parts under load: MINUTES=10, SEED to repeat one.
	@$(SUDO) tests/chaos.sh --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

# All targets at once: one set of features, so that nothing is compiled twice.
build: tools init ## Build all programs for tests.
	cargo build --locked --workspace --all-targets
	@mkdir -p $(POLYDEV_BIN)
	@find target/debug -maxdepth 1 -type f -executable -exec ln -f -t $(POLYDEV_BIN) {} +
	@ln -f target/$(HOST)/init/polydev-init $(POLYDEV_BIN)/polydev-init

launch-gate:   ## Whether this checkout may be released.
	@scripts/launch-gate.sh

trilogy:       ## Three tasks of a model, without and with the gate for tool calls.
	@cargo run --locked --quiet --package polydev-tool-gate -- trilogy

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

# Not in rust-toolchain.toml: nothing else needs its library.
arm64:         ## Clippy for 64-bit ARM, on which no test runs; needs gcc-aarch64-linux-gnu.
	@! command -v rustup >/dev/null || rustup target add aarch64-unknown-linux-gnu
	CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc \
	    cargo clippy --locked --workspace --target aarch64-unknown-linux-gnu -- --deny warnings

# For whoever reads the code, so that private items are in it, and links to them are right.
doc:           ## The documentation of the crates, warnings denied.
	RUSTDOCFLAGS="--deny warnings --allow rustdoc::private_intra_doc_links" cargo doc --locked --workspace --features polydev-tests/as-in-tests --no-deps --document-private-items

scripts:       ## shellcheck of all scripts.
	git ls-files '*.sh' | xargs shellcheck --external-sources --source-path SCRIPTDIR --severity warning

deny:          ## Licences, sources and bans of the dependencies.
	cargo deny --locked check bans licenses sources

advisories:    ## Known vulnerabilities of the dependencies; needs the network.
	cargo deny --locked check advisories

proto-lint:    ## buf lint of our protocols.
	cd proto && buf lint

proto-breaking: ## buf breaking: what an earlier client could not read any more.
	@tests/proto-breaking.sh

# One process a test: see .config/nextest.toml.
unit:          ## Unit, property, model and service tests.
	cargo nextest run --locked --workspace -E 'not binary(/^(it|sandbox)$$/)'
	cargo test --locked --workspace --doc --quiet

fuzz:          ## Fuzz what reads bytes from outside: SECONDS=20 for each target.
	tests/fuzz/run.sh $(or $(SECONDS),20)

# TESTS is a filter of nextest's, for some of them. BUILT names what has been built, where the
# compiler has something else to do.
it:            ## Tests of the whole system: root, Docker, Nomad, images.
	cargo nextest run $(or $(BUILT),--locked --workspace) -E 'binary(/^(it|sandbox)$$/)$(if $(TESTS), & ($(TESTS)))'

long:
	cargo nextest run --locked --workspace --profile long -E 'test(/(^|::)long::/)'

agent:         # Those of the tests that have a Nomad agent.
	cargo nextest run --locked --workspace -E 'binary(it) & group(nomad)'

clean-all:     ## Remove what demo, test and bench left: target, cache, images.
	@$(SUDO) tests/with-docker.sh tests/clean-all.sh
