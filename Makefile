# `make demo`: from nothing to a trained, evaluated model. `make test`: everything CI checks.
# Both make .venv first, from the pinned packages of constraints.txt: `demo` with what a user needs
# (`make install`), `test` with the optional packages and a developer's tools, too (`make venv`).
#
# Variables: PYTHON (an interpreter of 3.11 or newer), EXTRAS (optional packages of a user, such as
# EXTRAS=deepspeed,slurm), TORCH_ARGS (further options for installing torch, such as another index
# with a build for your GPU or for CPUs only), PYTEST_ARGS.

PYTHON ?= python3
EXTRAS ?=
TORCH_ARGS ?=
PYTEST_ARGS ?=
MARKERS ?= not slow and not matrix and not slurm and not gpu and not trl and not trlx and not vllm and not browser and not harness and not sagemaker and not tensorboard

VENV := .venv
BIN := $(VENV)/bin
# A user's packages with these extras; a developer's.
USER_STAMP := $(VENV)/.installed-user$(if $(EXTRAS),-$(EXTRAS))
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest
SOURCES := rlhf_exp hydra_plugins tests examples $(wildcard benchmarks) $(wildcard *.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install venv demo test test-lowest check lint imports types format clean

help:
	@echo "make demo    train and evaluate the bundled example, then show its report's path"
	@echo "make test    lint, types, imports and the tests (those that need no GPU or browser;"
	@echo "             where Slurm is installed, those that start one)"
	@echo "make test-lowest  tests of models and training with the oldest versions allowed"
	@echo "make check   lint, types and imports only"
	@echo "make format  let ruff format and mend what it can"
	@echo "make install install into $(VENV) what running needs; EXTRAS=deepspeed,slurm,... adds to it"
	@echo "make venv    install into $(VENV) a developer's tools, too"
	@echo "make clean   remove $(VENV) and caches; outputs/ stays"

install: $(USER_STAMP)

venv: $(STAMP)

$(USER_STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is missing or older than Python 3.11 (found:" \
	    "$$($(PYTHON) --version 2>&1)). Name another one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' cannot make virtual environments." \
	    "On Debian or Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH_ARGS) -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

$(STAMP): $(USER_STAMP)
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(USER_STAMP)
	$(BIN)/python launch.py experiment=demo

# The tests with a Slurm of their own start daemons and wait for nodes to die: alone, they are quick.
# Exit code 5: PYTEST_ARGS chose none of them.
test: check
	$(PYTEST) -n 2 -m '$(MARKERS)' $(PYTEST_ARGS)
ifeq ($(origin MARKERS),file)
	$(PYTEST) -rs -m 'slurm and not slow' $(PYTEST_ARGS) || [ $$? = 5 ]
endif

# In an environment of its own: the packages of constraints-lowest.txt, and what hangs on their versions
# by pip's choice; of the others, those of constraints.txt.
LOWEST := .venv-lowest
LOWEST_FREE := torch|transformers|tokenizers|huggingface_hub|hf-xet|datasets|fsspec
LOWEST_TESTS := tests/algo tests/models tests/rollout tests/training tests/distributed

$(LOWEST)/.installed: pyproject.toml constraints.txt constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	grep -vE '^($(LOWEST_FREE))==' constraints.txt > $(LOWEST)/constraints.txt
	cat constraints-lowest.txt >> $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet $(TORCH_ARGS) -c $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/python -m pip install --quiet -c $(LOWEST)/constraints.txt -e '.[dev]'
	@touch $@

test-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(LOWEST)/bin/pytest -n 2 -m '$(MARKERS)' -k 'not table_has_every_family' $(PYTEST_ARGS) \
	  $(LOWEST_TESTS)

check: lint imports types

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

imports: $(STAMP)
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy rlhf_exp $(wildcard *.py)

format: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache \
	  .grimp_cache .import_linter_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
