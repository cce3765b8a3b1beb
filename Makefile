# Two commands on a fresh machine: `make demo` and `make test`. Everything is set up in $(VENV) on the way.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.fastcompress-ready
DOCS_READY := $(VENV)/.fastcompress-docs-ready
LIBRARY := fastcompress/_C.so
SOURCES := $(shell find csrc -type f)
PYTEST := $(BIN)/python -m pytest -q

# A wheel: the CUDA toolkit to build with and the GPUs to build for, by default those of wheels.json
# (`make wheel CUDA=13.0 ARCHS="80;90;100;120"`); `make wheels` has all of them from wheels.json.
CUDA ?= none
ARCHS ?=
WHEEL ?=
# `make gpu DRY=1`: every step of it on a machine without a GPU.
DRY ?=

.PHONY: help demo experiment test test-slow test-full test-emulated sanitize fuzz bench bench-check bench-report gpu lint docs \
    build wheel wheels wheel-test clean

help:
	@echo "make demo       set up, build, and see speech become fewer tokens (pictures in out/)"
	@echo "make experiment train and score with and without compression: hours; QUICK=1: minutes"
	@echo "make test       set up, build, and test: some ten minutes"
	@echo "make test-slow  the long forms of the tests alone"
	@echo "make test-full  the long forms of the tests as well"
	@echo "make test-emulated  the tests of the ops on the CUDA kernels, which an emulator runs on the CPU"
	@echo "make sanitize   the ops, on the CPU and emulated, under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make fuzz       look for input that breaks an op or a reader, for SECONDS=240"
	@echo "make bench      time everything on the CPU against baselines; SAVE=1 writes benchmarks/results/"
	@echo "make bench-check  time a part of it, and compare the ratios with those that are committed"
	@echo "make bench-report  write benchmarks/report.md and its plots from the committed results"
	@echo "make gpu        on a machine with a GPU: build for it, test on it, benchmark it; no network needed"
	@echo "make lint       ruff, clang-format, mypy --strict"
	@echo "make docs       the documentation as a site, in out/site"
	@echo "make wheel      a wheel in dist/, for any Python and any torch from 2.10 on; CUDA=13.0 adds CUDA kernels"
	@echo "make wheels     every wheel of wheels.json whose CUDA toolkit can be had, for any Linux of its age, and the sdist"
	@echo "make wheel-test the wheels in dist/ in empty environments beside several torch; downloads gigabytes of torch"

# A torch that is there already is used, from 2.10 on; else the pinned one is fetched. Likewise triton, of any version.
$(READY): pyproject.toml requirements-torch.txt requirements-triton.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "fastcompress needs Python 3.10 or later; $(PYTHON) is older (make PYTHON=...)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv --system-site-packages $(VENV)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10))' \
	    2>/dev/null; then \
	    echo "using $$($(BIN)/python -c 'import torch; print("torch", torch.__version__, torch.__file__)')"; \
	else \
	    echo "no torch >= 2.10 found: downloading $$(cat requirements-torch.txt) (200 MB, or several GB with CUDA)"; \
	    $(BIN)/python -m pip install -q -r requirements-torch.txt; \
	fi
	@echo "installing the development requirements into $(VENV)"
	$(BIN)/python -m pip install -q 'setuptools>=77' wheel ninja
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[lalm,dev]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install -q -r requirements-triton.txt
	@touch $@

$(LIBRARY): $(READY) setup.py $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

build: $(LIBRARY)

demo: build
	$(BIN)/fastcompress inspect assets/speech/*.wav --png out/demo
	@echo
	$(BIN)/python examples/demo.py

# `make experiment QUICK=1`: LoRA on the shipped model alone.
QUICK ?=
experiment: build
	$(BIN)/python -m experiments $(if $(QUICK),--quick)

test: build
	$(PYTEST) -n 2 --dist loadgroup

test-slow: build
	$(PYTEST) -n 2 --dist loadgroup --run-slow -m slow

test-full: build
	$(PYTEST) -n 2 --dist loadgroup --run-slow

EMULATED := adjacent_distance greedy_segments select_boundaries segment_reduce segment_pool pack pack_errors errors \
    properties opcheck
test-emulated: build
	$(BIN)/python -c 'from tests.support.cuda_emulation import build; build()'
	$(PYTEST) -n 2 --emulated 11 $(EMULATED:%=tests/ops/test_%.py)

# Of the CPU's kernels alone: KINDS="address thread".
KINDS ?=
sanitize: build
	bash scripts/sanitize.sh $(BIN)/python $(KINDS)

SECONDS ?= 240
fuzz: build
	$(BIN)/python -m pip install -q atheris || echo "atheris does not install here: only the ops will be fuzzed"
	$(BIN)/python -m tests.fuzz $(SECONDS)

SAVE ?=
# The release of FBGEMM for the pinned torch; another may not load it.
bench: build
	$(BIN)/python -m pip install -q --no-build-isolation torch-scatter || \
	    echo "torch-scatter does not install here: its rows will be missing"
	$(BIN)/python -m pip install -q --no-deps fbgemm-gpu-cpu==1.8.0 || \
	    echo "fbgemm-gpu-cpu does not install here: its rows will be missing"
	$(BIN)/python -m benchmarks $(if $(SAVE),--save)

bench-report: $(READY)
	$(BIN)/python -m benchmarks --report

bench-check: build
	$(BIN)/python -m benchmarks.gate

# Runs in $(VENV) if there is one, else in $(PYTHON), which needs torch, triton, pytest, setuptools and ninja.
gpu:
	$(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) scripts/gpu.py $(if $(DRY),--dry) \
	    $(if $(WHEEL),--wheel $(WHEEL))

FORMATTED := $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/mypy

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install -q 'fastcompress[docs]'
	@touch $@

# Not -q, with which mkdocs forgets to be strict.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "wrote out/site/index.html"

# What an earlier build left in build/lib would go into the wheel.
wheel: $(READY)
	rm -rf build/lib build/lib.*
	FASTCOMPRESS_CUDA="$(CUDA)" FASTCOMPRESS_CUDA_ARCHS="$(ARCHS)" \
	    $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .

wheels: $(READY)
	$(BIN)/python -m pip install -q 'fastcompress[wheels]'
	$(BIN)/python scripts/wheels.py --sdist

wheel-test: $(READY)
	$(BIN)/python scripts/wheel_test.py $(WHEEL)

clean:
	rm -rf build dist out *.egg-info $(LIBRARY) $(READY) $(DOCS_READY)
