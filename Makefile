# `make demo` and `make test` need python3 (3.10 to 3.13), python3-venv and make; nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
FOLDERS := accelerators agent modules protos simulator
FARM := build/typing/gatelet
ANY_PYTHON = $(or $(PYTHON),python3)
export ORT_DISABLE_TELEMETRY := 1
# To use a certain interpreter: make PYTHON=python3.12 demo
export PYTHON

NEED_PYTHON = command -v $(ANY_PYTHON) >/dev/null || { \
	echo "gatelet needs Python 3.10 to 3.13 ($(ANY_PYTHON) is missing): apt-get install python3 python3-venv" >&2; exit 1; }

# The interpreter that .venv was made of is gone: make it anew.
$(shell [ -x $(BIN)/python ] || rm -f $(VENV)/*.stamp)

.PHONY: help demo test lint format typecheck unit bench dist clean

help:
	@echo "make demo   run the whole agent on a simulated site"
	@echo "make test   lint, type check and run all tests"
	@echo "make lint | typecheck | unit | bench | format | dist | clean"

demo: $(VENV)/demo.stamp
	@$(BIN)/gatelet demo

# By file: a file's tests share what they start.
test: lint typecheck
	$(BIN)/python -m pytest -n 2 --dist loadfile

unit: $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/unit

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

typecheck: $(VENV)/dev.stamp farm
	$(BIN)/mypy -p gatelet $(shell $(BIN)/python -c "import sys; v = sys.version_info; print(f'--python-version={v[0]}.{v[1]}' if v >= (3, 12) else '')")

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/dev.stamp
	@for file in tests/bench/bench_*.py; do echo "== $$file"; $(BIN)/python $$file; done

dist: $(VENV)/dev.stamp
	@rm -rf build/lib build/bdist.*
	$(BIN)/python -m build --no-isolation

# The package's folders lie at the top of the tree; the type checker sees them under one name.
.PHONY: farm
farm:
	@mkdir -p $(FARM)
	@$(foreach folder,$(FOLDERS),ln -sfn ../../../$(folder) $(FARM)/$(folder);)

# Made anew when pyproject.toml changes; what the tests need includes what the demo needs.
$(VENV)/demo.stamp: pyproject.toml tools/environment.py
	@[ $(VENV)/dev.stamp -nt pyproject.toml -a $(VENV)/dev.stamp -nt tools/environment.py ] || { $(NEED_PYTHON); $(ANY_PYTHON) tools/environment.py demo; }
	@touch $@

$(VENV)/dev.stamp: pyproject.toml tools/environment.py
	@$(NEED_PYTHON); $(ANY_PYTHON) tools/environment.py dev
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
