# make demo   fine-tune a real model on real text (installs what is missing, builds, runs)
# make test   build everything and run every test
# make cuda-check   the same with CUDA kernels and a torch that has CUDA (5 GB; needs nvcc, no GPU)
# make matrix   every method on every model, form of base and side, as a table
# make lint | bench | bench-report | clean
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= 2.13.0
CUDA_TORCH ?= 2.14.1
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
JOBS ?= $(shell nproc)
BUILD := build/release
CUDA_BUILD := build/cuda

py := $(VENV)/bin/python
cuda_py := $(CUDA_VENV)/bin/python
pip := $(py) -m pip --disable-pip-version-check
say = @printf '\n\033[1m== %s\033[0m\n' "$(1)"

apt_packages := cmake ninja-build g++ libfmt-dev nlohmann-json3-dev libcli11-dev doctest-dev \
  libpcre2-dev
ifeq ($(shell $(PYTHON) -c 'import sysconfig, os; print(os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' 2>/dev/null),False)
apt_packages += python3-dev
endif
ifneq ($(shell $(PYTHON) -c 'import ensurepip; print(1)' 2>/dev/null),1)
apt_packages += python3-venv
endif

sources := $(shell find quant peft bindings tools cmake python tests/cpp -type f \
  -not -name '*.pyc' 2>/dev/null) CMakeLists.txt pyproject.toml VERSION

.PHONY: help demo test matrix cuda-check lint bench bench-report clean build system check-consumer

help:
	@sed -n '1,5s/^# //p' Makefile

system:
	@missing=; for p in $(apt_packages); do \
	  dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; \
	done; \
	if [ -n "$$missing" ]; then \
	  printf '\n\033[1m== Installing system packages:%s\033[0m\n' "$$missing"; \
	  if [ "$$(id -u)" = 0 ]; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing > /dev/null; \
	  else \
	    echo "these Debian packages are missing: sudo apt-get install$$missing"; exit 1; \
	  fi; \
	fi

$(VENV)/.ready: requirements-dev.txt requirements-data.txt | system
	$(call say,Python environment in $(VENV) with torch $(TORCH))
	$(PYTHON) -m venv $(VENV)
	$(pip) install -q --upgrade pip
	$(pip) install -q torch==$(TORCH) numpy
	$(pip) install -q -r requirements-dev.txt
	$(pip) install -q --no-deps -r requirements-data.txt
	@touch $@

build: $(VENV)/.installed
$(VENV)/.installed: $(VENV)/.ready $(sources)
	$(call say,Building Budwood ($(JOBS) jobs; a first build takes some minutes))
	@mkdir -p build
	@set -o pipefail; CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(pip) install --no-build-isolation \
	  --no-deps -v -C build-dir=$(BUILD) -C cmake.define.BUDWOOD_DEVELOPER_MODE=ON . 2>&1 \
	  | tee build/build.log | { grep --line-buffered -E '^ *\[[0-9]+/[0-9]+\] (Build|Link)' || true; } \
	  || { grep -B2 -A12 -E 'error|Error' build/build.log | tail -80; \
	       echo 'The build failed; all of its output is in build/build.log'; exit 1; }
	@touch $@

demo: build
	$(call say,Demo)
	$(py) examples/demo/run.py

test: build
	$(call say,C++ tests)
	ctest --test-dir $(BUILD) --output-on-failure
	$(call say,Installation and consumer project)
	PYTHON=$(CURDIR)/$(py) BUILD=$(CURDIR)/$(BUILD) tests/consumer/run.sh
	$(call say,Examples)
	PYTHON=$(CURDIR)/$(py) BUILD=$(CURDIR)/$(BUILD) tests/examples.sh
	$(call say,Python tests)
	$(py) -m pytest tests/python

matrix: build
	$(call say,Test matrix)
	$(py) tests/matrix.py

# Another torch, with CUDA, in an environment of its own. Device code runs only where there is a GPU.
$(CUDA_VENV)/.ready: requirements-dev.txt requirements-data.txt | system
	$(call say,Python environment in $(CUDA_VENV) with torch $(CUDA_TORCH), about 6 GB)
	$(PYTHON) -m venv $(CUDA_VENV)
	$(cuda_py) -m pip install -q --upgrade pip
	$(cuda_py) -m pip install -q torch==$(CUDA_TORCH) numpy
	$(cuda_py) -m pip install -q -r requirements-dev.txt
	$(cuda_py) -m pip install -q --no-deps -r requirements-data.txt
	@touch $@

cuda-check: $(CUDA_VENV)/.ready
	$(call say,Building with CUDA kernels and torch $(CUDA_TORCH) ($(JOBS) jobs))
	cmake -S . -B $(CUDA_BUILD) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DBUDWOOD_DEVELOPER_MODE=ON -DBUDWOOD_PYTHON=ON -DBUDWOOD_CUDA=ON \
	  -DPython3_EXECUTABLE=$(CURDIR)/$(cuda_py)
	cmake --build $(CUDA_BUILD) -j $(JOBS)
	$(call say,Operators registered for CUDA)
	PYTHONPATH=$(CUDA_BUILD)/python $(cuda_py) tests/cuda/registered.py
	$(call say,C++ tests with torch $(CUDA_TORCH); device code runs only where there is a GPU)
	ctest --test-dir $(CUDA_BUILD) --output-on-failure
	$(call say,Python tests with torch $(CUDA_TORCH), on the CPU)
	PYTHONPATH=$(CUDA_BUILD)/python $(cuda_py) -m pytest -rs tests/python

lint: $(VENV)/.ready
	$(py) -m ruff check python tests examples benchmarks
	$(py) -m ruff format --check python tests examples benchmarks
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

bench: build
	$(py) benchmarks/step.py

# docs/benchmarks.md and its plot, all measured anew where nothing is known of this machine
bench-report: build
	$(py) benchmarks/report.py

clean:
	rm -rf build $(VENV) $(CUDA_VENV) demo-out
