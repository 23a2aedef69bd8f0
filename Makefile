# Everything runs in .venv, which the first target that needs it makes. Needs Python 3.11 or newer, and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint types check format conformance clients faults rolling bench clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "nonstick needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[redis,postgres,fast,testing]' --group dev
	@touch $@

setup: $(READY) ## make .venv with everything in it

demo: $(READY) ## three nodes, a round-robin proxy, a real client, and a kill -9
	@$(BIN)/nonstick demo

test: $(READY) lint types ## lint, types and the tests, on real servers
	$(BIN)/python -m pytest -q -n 4 --dist loadfile -m "not slow"

test-all: $(READY) lint types ## the same with the tests that take long
	$(BIN)/python -m pytest -q -n 4 --dist loadfile

lint: $(READY)
	$(BIN)/ruff format --check --quiet src tests bench examples deploy || { echo "run: make format"; exit 1; }
	$(BIN)/ruff check --quiet src tests bench examples deploy
	$(BIN)/python -m tests.public_names
	@$(BIN)/lint-imports --no-logo >/dev/null || $(BIN)/lint-imports --no-logo

types: $(READY)
	$(BIN)/mypy

conformance: $(READY) ## the official MCP conformance suite against the SDK alone and against nonstick on three nodes
	$(BIN)/python -m tests.conformance.run $(ARGS)

clients: $(READY) ## the official TypeScript and Python clients against nonstick on three nodes
	$(BIN)/python -m pytest tests/clients

STORES := sqlite valkey postgres valkey-cluster valkey-sentinel

faults: $(READY) ## nodes, stores and networks fail under load, judged by an oracle; SECONDS=60 SEED=1 STORES="sqlite valkey"
	$(BIN)/python -m pytest -q tests/faults -k store_faults
	@for store in $(STORES); do \
		$(BIN)/python -m tests.faults.campaign --store $$store --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED)) || exit 1; \
	done

rolling: $(READY) ## the last release and this code on one store, nodes replaced under load, there and back
	$(BIN)/python -m pytest -q tests/rolling

bench: $(READY) ## what it costs beside the SDKs, as ratios within one run, about 5 minutes; FULL=1 all of it
	$(BIN)/python -m bench $(if $(FULL),--full) $(ARGS)

check: format test ## format, then test

format: $(READY) ## format and fix what ruff can fix
	$(BIN)/ruff format --quiet src tests bench examples deploy
	$(BIN)/ruff check --quiet --fix src tests bench examples deploy

clean: ## remove what the targets above made
	rm -rf $(VENV) .import_linter_cache .mypy_cache .ruff_cache .pytest_cache .hypothesis tests/*/node_modules
