# One virtual environment, made by pip alone and reused. Every target does its own set-up, once.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
INPUTS := pyproject.toml constraints.txt weights.txt scripts/install.sh

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench claims lint format docs clean system-packages

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|' 2>/dev/null \
		|| grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST))

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Corrigible needs Python 3.11 or newer, this is %d.%d; try: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No virtual environment could be made. On Debian: apt-get install python3-venv" >&2; exit 1; }

$(STAMP): $(INPUTS) | $(BIN)/python
	@sh scripts/install.sh $(VENV)
	@touch $@

$(DEV_STAMP): $(INPUTS) | $(BIN)/python
	@sh scripts/install.sh $(VENV) dev,docs,postgres,bench
	@touch $@ $(STAMP)

system-packages:
	@sh scripts/system-packages.sh

demo: $(STAMP) ## turn the whole loop once on SmolLM2-135M (some minutes), result in runs/demo
	@$(BIN)/corrigible demo --out runs/demo

test: $(DEV_STAMP) system-packages ## the tests
	@$(BIN)/python -m pytest -m "not slow"

test-all: $(DEV_STAMP) system-packages ## the tests and the slow ones
	@$(BIN)/python -m pytest

bench: $(DEV_STAMP) ## measure, on an idle machine, into bench/RESULTS.md
	@$(BIN)/python -m bench

claims: $(STAMP) ## run the claims whose code has changed (up to three hours), into docs/claims/results
	@$(BIN)/corrigible claims run --all --keep --results docs/claims/results
	@$(BIN)/corrigible claims report --results docs/claims/results

lint: $(DEV_STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_STAMP) ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV_STAMP) ## the documentation site, into site/
	@$(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

clean: ## remove the environment and what was built
	rm -rf $(VENV) build dist site
