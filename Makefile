# make demo     a federation of three hospitals on this machine, from nothing to report.html
# make test     everything that a change must pass
# make help     the other targets
#
# Variables, all optional, given as make demo NAME=VALUE:
#   PYTHON       Python 3.11 or newer                                                     (python3)
#   VENV         where everything is installed; nothing is installed outside it           (.venv)
#   TORCH_INDEX  package index of the PyTorch build to install, one without CUDA or for another CUDA
#                version; PyTorch's installation page lists them. Only PyTorch is taken from it. Read
#                when VENV is made; after a change: make distclean            (empty: pip's default)
#   DATA         images for the demo, an .npz as in PneumoniaMNIST             (empty: see fedward demo)
#   OUT          where the demo writes                                                    (demo-out)
#   FUZZ_MINUTES how long each part of make fuzz runs                                         (10)
#   PYTEST_ARGS  tests to run instead of all; the coverage floor is then not asked for    (empty)
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
DATA ?=
OUT ?= demo-out
FUZZ_MINUTES ?= 10
PYTEST_ARGS ?=

BIN := $(VENV)/bin
CONSTRAINTS := deploy/constraints.txt
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev demo test lint format fuzz bench constraints clean distclean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | while IFS='|' read -r name text; do \
	  printf '%-12s %s\n' "$$name" "$$text"; done

setup: $(VENV)/.setup ## install fedward with pinned dependencies into VENV
	@:

setup-dev: $(VENV)/.setup-dev ## the same, and what the tests need
	@:

demo: setup ## three sites over mutual TLS, five rounds, report.html
	@$(BIN)/fedward demo --out "$(OUT)" $(if $(DATA),--data "$(DATA)")

test: setup-dev lint ## format, lint, types, all tests, coverage of all processes
	@$(BIN)/coverage erase
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/coverage run -m pytest -rs $(PYTEST_ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report $(if $(PYTEST_ARGS),--fail-under=0)

lint: setup-dev ## format, lint, types
	@$(BIN)/ruff format --quiet --check . || { echo 'Not formatted: make format'; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/mypy --no-error-summary deploy tests

format: setup-dev ## format all Python files, and fix what the linter can
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format .

fuzz: setup-dev ## damaged DICOM files against the header parser and the index; for the night
	@FEDWARD_FUZZ_S=$$(( $(FUZZ_MINUTES) * 60 )) $(BIN)/python -m pytest tests/client/test_fuzz_header.py
	@$(BIN)/python tests/client/fuzz_index.py --minutes $(FUZZ_MINUTES)

bench: ## the benchmarks, one line each
	@$(PYTHON) -c "$$LIST_BENCHMARKS"

constraints: setup-dev ## write the versions installed now to deploy/constraints.txt
	@$(BIN)/python deploy/pin_constraints.py

clean: ## remove what builds, tests and the demo wrote
	@rm -rf build dist htmlcov demo-out .coverage .coverage.* .hypothesis .mypy_cache .ruff_cache .pytest_cache
	@find client common deploy server tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## also remove VENV
	@rm -rf "$(VENV)"

$(VENV)/bin/python:
	@command -v "$(PYTHON)" > /dev/null || { echo '$(PYTHON) not found: install Python 3.11 or newer, or make ... PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo '$(PYTHON) is too old, fedward needs Python 3.11 or newer: make ... PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null \
	  || { echo '$(PYTHON) has no venv module: on Debian and Ubuntu, install python3-venv'; exit 1; }
	@$(PYTHON) -m venv "$(VENV)"

# PyTorch comes first and alone: an index given for it need not have anything else, and once it is there no
# other package brings a different build. Afterwards everything else is as in the constraints.
$(VENV)/.setup: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@echo 'Installing fedward into $(VENV) (the first time takes some minutes) ...'
	@$(PIP) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)",--constraint $(CONSTRAINTS)) "$$(grep '^torch==' $(CONSTRAINTS))"
	@$(PIP) --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.setup-dev: pyproject.toml $(CONSTRAINTS) $(VENV)/.setup
	@echo 'Installing what the tests need ...'
	@$(PIP) --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

define LIST_BENCHMARKS
import ast, pathlib
for path in sorted(pathlib.Path("tests/benchmarks").glob("[!_]*.py")):
    text = path.read_text(encoding="utf-8")
    if "__main__" in text:
        summary = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        print(f"python {path} --json    {summary}")
endef
export LIST_BENCHMARKS
