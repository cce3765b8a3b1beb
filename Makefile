# `make demo` and `make test` work on a fresh machine: they first install their requirements into $(VENV). `make help`
# lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.fastcompress-ready
DOCS_READY := $(VENV)/.fastcompress-docs-ready
# make vllm-test: Python 3.11, for which the CPU build of torch that vLLM pins is most often at hand.
VLLM_PYTHON ?= python3.11
VLLM_VENV ?= .venv-vllm
VLLM_READY := $(VLLM_VENV)/.fastcompress-ready
LIBRARY := fastcompress/_C.so
SOURCES := $(shell find csrc -type f)
PYTEST := $(BIN)/python -m pytest -q

# make wheel: the CUDA toolkit, and the GPUs, by default those of wheels.json (CUDA=13.0 ARCHS="80;90;100;120").
CUDA ?= none
ARCHS ?=
# make wheel-test, make gpu: the wheel to use.
WHEEL ?=
# make gpu: the folder of logs and results; DRY=1 runs short forms of the steps on a machine without a GPU.
OUT ?= out/gpu
DRY ?=

.PHONY: help demo experiment build test test-slow test-full test-emulated vllm-env vllm-test sanitize fuzz lint docs bench \
    bench-check bench-report sass gpu gpu-driver gpu-build gpu-check gpu-test gpu-sanitize gpu-bench wheel wheels \
    wheel-test clean

help:
	@echo "Try it"
	@echo "  make demo          compress speech, transcribe it and write pictures to out/demo"
	@echo "                     MODEL=openai/whisper-tiny.en: also compress Whisper (folder or name)"
	@echo "  make experiment    train and score models with and without compression (hours; QUICK=1: minutes)"
	@echo "                     REAL=DIR: compress Whisper without training, on the speech and models in DIR"
	@echo
	@echo "Develop"
	@echo "  make build         compile the CPU kernels"
	@echo "  make test          run the tests"
	@echo "  make test-slow     run only the slow tests"
	@echo "  make test-full     run the tests and the slow tests"
	@echo "  make test-emulated run the CUDA kernels in an emulator, and the Triton kernels in its interpreter"
	@echo "  make vllm-test     run the plug-in in vLLM, in $(VLLM_VENV) (downloads 0.6 GB, takes 4 GB; FAST=1: no engine)"
	@echo "  make sanitize      run the tests of the ops under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "                     (KINDS=\"address thread\" skips the emulated CUDA kernels)"
	@echo "  make fuzz          search for input that breaks an op or a reader (SECONDS=240)"
	@echo "  make lint          run ruff, clang-format, mypy and the style check of the prose"
	@echo "  make docs          build the documentation in out/site"
	@echo "  make clean         delete everything that was built"
	@echo
	@echo "Measure"
	@echo "  make bench         compare with PyTorch on the CPU; SAVE=1 appends to benchmarks/results"
	@echo "  make bench-check   run some of the benchmarks; fail if fastcompress is slower than in the committed results"
	@echo "  make bench-report  write benchmarks/report.md and its plots from the committed results"
	@echo "  make sass          read the machine code of the CUDA kernels and predict their speed (needs nvcc, no GPU;"
	@echo "                     KERNEL=REGEX, ARCH=90)"
	@echo
	@echo "On a machine with a GPU (needs no network; OUT=out/gpu: folder of logs and results; DRY=1: short forms, no GPU)"
	@echo "  make gpu           run all of the following steps; WHEEL=... uses the library of a wheel"
	@echo "  make gpu-driver    build build/gpu_driver, which checks and times the kernels without torch (ARCH=90; no GPU)"
	@echo "  make gpu-build     compile for this GPU"
	@echo "  make gpu-check     check the bits of the kernels by the driver, measure ceilings, and time plans"
	@echo "  make gpu-test      run the GPU tests and the tests of the ops on the CUDA and the Triton kernels"
	@echo "  make gpu-sanitize  run the driver on short shapes under compute-sanitizer"
	@echo "  make gpu-bench     compare with PyTorch on the GPU"
	@echo
	@echo "Release"
	@echo "  make wheel         build a wheel in dist; CUDA=13.0 adds CUDA kernels"
	@echo "  make wheels        build every wheel of wheels.json whose CUDA toolkit is available, and the sdist"
	@echo "  make wheel-test    test the wheels in dist with several versions of torch (downloads gigabytes)"

# Uses an installed torch of version 2.10 or later and any installed triton; otherwise installs the pinned ones.
$(READY): pyproject.toml requirements-torch.txt requirements-triton.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "fastcompress needs Python 3.10 or later, and $(PYTHON) is older: set PYTHON=..."; exit 1; }
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

# MODEL=openai/whisper-tiny.en also runs a Whisper model, by name or folder.
MODEL ?=
demo: build
	$(BIN)/fastcompress inspect assets/speech/*.wav --png out/demo
	@echo
	$(BIN)/python examples/demo.py
	@echo
ifneq ($(MODEL),)
	$(BIN)/python examples/whisper.py $(MODEL)
else
	@echo "make demo MODEL=openai/whisper-tiny.en shows the same with Whisper (downloads 150 MB; or a folder)"
endif

# QUICK=1 trains only LoRA on the shipped model. REAL=DIR measures Whisper on real speech instead (docs/sweep.md).
QUICK ?=
REAL ?=
experiment: build
ifneq ($(REAL),)
	$(BIN)/python -m experiments.real $(REAL)
	$(BIN)/python -m experiments.real_published $(REAL)
	$(BIN)/python -m experiments.real_report --write
else
	$(BIN)/python -m experiments $(if $(QUICK),--quick)
endif

test: build
	$(PYTEST) -n 2 --dist loadgroup

test-slow: build
	$(PYTEST) -n 2 --dist loadgroup --run-slow --run-emulated -m slow

test-full: build
	$(PYTEST) -n 2 --dist loadgroup --run-slow --run-emulated

EMULATED := adjacent_distance greedy_segments select_boundaries segment_reduce segment_pool pack pack_errors errors \
    min_variance banded_distance properties opcheck
test-emulated: build
	$(BIN)/python -c 'from tests.support.cuda_emulation import build; build()'
	$(PYTEST) -n 2 --dist loadgroup --run-emulated -m emulated tests/csrc tests/gpu tests/triton
	$(PYTEST) -n 2 --emulated 11 $(EMULATED:%=tests/ops/test_%.py)

# vLLM's requirements include builds of torchvision, torchaudio and torchcodec that do not load beside a CPU torch.
$(VLLM_READY): requirements-vllm.txt
	@$(VLLM_PYTHON) --version || { echo "set VLLM_PYTHON to Python 3.11 or later"; exit 1; }
	@echo "installing vLLM into $(VLLM_VENV): downloads about 0.6 GB, takes about 4 GB and a few minutes"
	$(VLLM_PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q -r requirements-vllm.txt
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

vllm-env: $(VLLM_READY)

# FAST=1 leaves out the tests that run an engine or a server. The package is the checkout, whose entry points are in
# fastcompress.egg-info and whose compiled library runs with any torch.
FAST ?=
VLLM_FAST := models processing voxtral
vllm-test: build $(VLLM_READY)
	$(BIN)/python setup.py -q egg_info
	PYTHONPATH=$(CURDIR) $(VLLM_VENV)/bin/python -m pytest -q -rs \
	    $(if $(FAST),$(VLLM_FAST:%=tests/integrations/vllm/test_%.py),--run-slow tests/integrations/vllm)

# KINDS="address thread" skips the emulated CUDA kernels.
KINDS ?=
sanitize: build
	bash scripts/sanitize.sh $(BIN)/python $(KINDS)

SECONDS ?= 240
fuzz: build
	$(BIN)/python -m pip install -q atheris || echo "atheris cannot be installed: only the ops are fuzzed"
	$(BIN)/python -m tests.fuzz $(SECONDS)

SAVE ?=
# This release of FBGEMM is the one for the pinned torch; another torch may not load it.
bench: build
	$(BIN)/python -m pip install -q --no-build-isolation torch-scatter || \
	    echo "torch-scatter cannot be installed: its rows will be missing"
	$(BIN)/python -m pip install -q --no-deps fbgemm-gpu-cpu==1.8.0 || \
	    echo "fbgemm-gpu-cpu cannot be installed: its rows will be missing"
	$(BIN)/python -m benchmarks $(if $(SAVE),--save)

bench-report: $(READY)
	$(BIN)/python -m benchmarks --report

bench-check: build
	$(BIN)/python -m benchmarks.gate

ARCH ?= 90
KERNEL ?=
sass: $(READY)
	$(BIN)/python -m scripts.sass --arch $(ARCH) --kernel '$(KERNEL)'

# Uses $(VENV) if it was set up, else $(PYTHON), which needs torch, triton, pytest, setuptools and ninja,
# and for the benchmark pandas and tabulate.
GPU = $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) scripts/gpu.py --out $(OUT) $(if $(DRY),--dry) \
    $(if $(WHEEL),--wheel $(WHEEL))
gpu:
	$(GPU)

gpu-driver:
	$(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) scripts/build_driver.py --arch $(ARCH)

gpu-build:
	$(GPU) build

gpu-check:
	$(GPU) driver

gpu-test:
	$(GPU) test

gpu-sanitize:
	$(GPU) sanitize

gpu-bench:
	$(GPU) bench

FORMATTED := $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/mypy
	$(BIN)/python scripts/prose.py

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install -q 'fastcompress[docs]'
	@touch $@

# No -q: it makes mkdocs ignore `strict`.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "wrote out/site/index.html"

# Files of an earlier build in build/lib would go into the wheel.
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
