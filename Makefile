# `make demo` and `make test` need python3 (3.10 to 3.13), python3-venv and make; nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
FOLDERS := accelerators agent modules protos simulator
FARM := build/typing/gatelet
export ORT_DISABLE_TELEMETRY := 1

# pynq, and so the FPGA steps, need Python 3.12 at most: an older interpreter goes first.
PYTHON ?= $(shell for name in python3.12 python3.11 python3.10 python3 python3.13; do \
	command -v $$name >/dev/null && $$name -c 'import sys; sys.exit(not (3,10) <= sys.version_info[:2] <= (3,13))' 2>/dev/null \
	&& echo $$name && break; done)

# One line that counts packages instead of pages of output; errors come through whole.
COUNT := awk '/^Collecting|^  Downloading|^Installing/ { n += /^Collecting/; printf "\r\033[K  %d packages, %.60s", n, $$0; fflush() } END { print "" }'

.PHONY: help demo test lint format typecheck unit bench dist clean

help:
	@echo "make demo   run the whole agent on a simulated site"
	@echo "make test   lint, type check and run all tests"
	@echo "make lint | typecheck | unit | bench | format | dist | clean"

demo: $(VENV)/demo.stamp
	@$(BIN)/gatelet demo

test: lint typecheck
	$(BIN)/python -m pytest

unit: $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/unit

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

typecheck: $(VENV)/dev.stamp farm
	$(BIN)/mypy -p gatelet

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/dev.stamp
	@for file in tests/bench/bench_*.py; do echo "== $$file"; $(BIN)/python $$file; done

dist: $(VENV)/dev.stamp
	$(BIN)/python -m build --no-isolation

# The package's folders lie at the top of the tree; the type checker sees them under one name.
.PHONY: farm
farm:
	@mkdir -p $(FARM)
	@$(foreach folder,$(FOLDERS),ln -sfn ../../../$(folder) $(FARM)/$(folder);)

$(VENV)/python.stamp:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10 to 3.13 found; apt-get install python3 python3-venv" >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: $(PYTHON) cannot create environments; apt-get install $$(basename $(PYTHON))-venv (or python3-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
	@$(BIN)/python -c 'import sys; sys.version_info < (3, 13) or print("Note: pynq has no release for this Python; the FPGA steps need 3.12 or older")'
	@touch $@

$(VENV)/demo.stamp: pyproject.toml | $(VENV)/python.stamp
	@echo "Installing gatelet with what the demo needs (about a minute)"
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[demo]' | $(COUNT)
	@touch $@

$(VENV)/dev.stamp: pyproject.toml | $(VENV)/python.stamp
	@echo "Installing gatelet with what its tests need (about two minutes)"
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]' | $(COUNT)
	@touch $@ $(VENV)/demo.stamp

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
