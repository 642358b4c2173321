# make setup | demo | test | check: each can be run again at no cost.
# Needs Debian's python3 (3.10 to 3.13) with pip and venv; PYTHON=python3.12 picks another.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test check

help:  ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(VENV)/.installed  ## install everything into .venv

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 10) <= v else f"Python 3.10 or later is needed; this is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[host,x86,check,sweep,dev]'
	touch $@

demo: setup  ## the main job: LeNet-5 on handwritten digits, from training to report
	$(BIN)/greenprune run

test: setup  ## the tests
	$(BIN)/python -m pytest -n auto --durations=30

check: setup  ## lint, formatting, types and import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/pages.py --check
