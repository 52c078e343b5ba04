# `make help` lists the targets.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
# More options for pip, such as --index-url for another build of torch.
PIP_ARGS ?=
# What make bench runs: a file of benchmarks/.
BENCH ?= speed
# Test processes; they share the cores.
JOBS ?= 2
# More options for the command a target runs: make test ARGS="-k score"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: help setup demo test lint format bench pretrain clean

help: ## Show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

setup: $(STAMP) ## Create .venv with the library and the tools for developing it

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "got no $(PYTHON), expected Python 3.11 or newer: install it, or name it with make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "got $$($(PYTHON) --version 2>&1), expected Python 3.11 or newer: name another with make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); this takes minutes the first time" >&2
	@$(PIP) install $(PIP_ARGS) -c constraints.txt torch
	@$(PIP) install $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup ## Do the main job on the embedded model, start to end; results in demo/
	@$(BIN)/dsd demo --out demo $(ARGS)

test: setup ## Run the tests, all but those that need a GPU or the network
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: setup ## Check style, types and the order of the modules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup ## Format the code and repair what can be repaired
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup ## Measure what a score costs; another benchmark by BENCH=explain, cpu, memory, weights, more_examples or novel_words
	@$(BIN)/python benchmarks/$(BENCH).py --out docs/results/$(BENCH) $(ARGS)

pretrain: setup ## Train the embedded model anew, into runs/tiny; resumes where it stopped
	@$(BIN)/python -m dsd.tiny.pretrain --out runs/tiny $(ARGS)

clean: ## Remove caches, builds and demo/; keeps .venv and runs/
	@rm -rf demo dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
