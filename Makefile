# From a clean clone, with Python 3.11 or newer and nothing else: `make demo` or `make test`.
# Choices: make PYTHON=python3.12 ..., and PIP_ARGS for pip, as on a machine without a GPU, where it saves gigabytes:
#   make PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" demo

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
export PATH := $(abspath $(BIN)):$(PATH)
unexport PYTHONPATH PYTHONHOME

.PHONY: help demo test test-slow lint format constraints clean

help:
	@echo "make demo         adapt a real 135M chat model, score it, merge it"
	@echo "make test         lint, types and every fast test"
	@echo "make test-slow    the tests that use the real model"
	@echo "make lint         ruff and mypy"
	@echo "make format       let ruff sort imports and format"
	@echo "make constraints  write constraints.txt from what is installed in $(VENV)"
	@echo "make clean        remove $(VENV), caches and build outputs; runs/ and data/ stay"

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "make: '$(PYTHON)' not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; found = "%d.%d.%d" % sys.version_info[:3]; sys.exit(0 if sys.version_info >= (3, 11) else "make: Python 3.11 or newer is needed, " + sys.executable + " is " + found + "; name another: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch goes first and alone, so that a broken choice of its build shows before anything else is fetched.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[quant]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[dev,quant,tracking,deepspeed]"
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	@sh docs/demo.sh

lint: $(VENV)/.test
	ruff check .
	mypy

format: $(VENV)/.test
	ruff check --fix .
	ruff format .

test: lint
	pytest -m "not slow"

test-slow: $(VENV)/.test
	finetune base smollm2
	pytest -m slow

# Compiled-in parts of a version (+cpu) and packages that only one platform has are left out, so the file fits them all.
constraints: $(VENV)/.test
	@{ sed -n '/^#/p' constraints.txt; \
	   $(BIN)/python -m pip freeze --exclude-editable --exclude pip --exclude finetune-recipes \
	   | sed -E 's/\+[a-z0-9.]+$$//' | grep -E '^[A-Za-z0-9._-]+==' | grep -viE '^(nvidia|cuda)[-_]|^triton==' \
	   | LC_ALL=C sort -f; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
