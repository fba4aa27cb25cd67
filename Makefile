# `make demo`, `make test` and `make check` each set up what they need, on a fresh machine with Python and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint check format clean

demo: $(READY)
	@$(BIN)/everstate demo

test: $(READY)
	@echo "Running the tests on $$(nproc 2>/dev/null || echo 2) cores (some minutes)."
	@$(BIN)/pytest -n auto --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) with Everstate, PyTorch and the tools of the tests (once; a minute or two)."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Everstate needs Python 3.11 or newer; name one with: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@echo "Installing everything else ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "Ready."

clean:
	rm -rf $(VENV) demo runs
