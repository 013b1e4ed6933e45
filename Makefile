# The commands a newcomer needs. `make VENV=none ...` uses the python3, torch and packages that are already there.
TORCH ?= torch==2.13.0
VENV ?= .venv
PYTEST_ARGS ?=
FUZZ_ARGS ?= --calls 10000
# files of tests in two processes, whose idle threads must not spin; in one, where there is no pytest-xdist
SIDE_BY_SIDE = $(shell $(PYTHON) -c 'import xdist; print("-n 2 --dist loadfile")' 2>/dev/null)

ifeq ($(VENV),none)
PYTHON ?= python3
INSTALLED := build/.built
export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
else
BASE_PYTHON ?= python3
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
endif

SOURCES := setup.py pyproject.toml build_backend.py $(shell find csrc -type f)

.PHONY: build demo test test-build test-tiers test-triton test-peers test-faults test-processes fuzz bench gpu lint clean

build: $(INSTALLED)

$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -m pip --version >/dev/null 2>&1 || $(BASE_PYTHON) -m venv --clear $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade "$(TORCH)" numpy ninja "setuptools>=77" wheel
	$(PYTHON) -m pip install --quiet --no-build-isolation "$(TORCH)" --editable ".[test,bench,lint]"
	touch $@

build/.built: $(SOURCES)
	$(PYTHON) setup.py --quiet build_ext --inplace
	mkdir -p build && touch $@

demo: build  ## the whole pipeline on pictures that are drawn, to demo/report.html
	$(PYTHON) -m ribfast demo --out demo

test: build
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest $(SIDE_BY_SIDE) $(PYTEST_ARGS)

test-build: build  ## what takes minutes: CUDA sources, Triton's kernels, CPU tiers, a wheel from the sdist
	$(PYTHON) -m pytest tests/test_cuda_compile.py tests/test_triton_compile.py tests/test_packaging.py -m slow \
	    $(PYTEST_ARGS)

test-tiers: build  ## the operators' tests under each CPU tier
	$(PYTHON) -m pytest tests/test_backends.py -k tier $(PYTEST_ARGS)

test-triton: build  ## the Triton kernels in their interpreter, and compiled for sm_80 and sm_90
	$(PYTHON) -m pytest tests/test_backends.py tests/test_triton_compile.py -k triton -m "slow or not slow" $(PYTEST_ARGS)

test-peers: build  ## against pydensecrf, where it is installed, with other random cases on every run
	$(PYTHON) -m pytest tests -m peers -s $(PYTEST_ARGS)

test-processes: build  ## images and trainings shared by several processes, some of which die
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest $(SIDE_BY_SIDE) tests -m processes $(PYTEST_ARGS)

test-faults: build  ## bad images, full disks, kills at any moment, hostile files: the quick ones and those of minutes
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest $(SIDE_BY_SIDE) tests/test_faults.py tests/test_faults_slow.py \
	    -m "faults or not faults" $(PYTEST_ARGS)

fuzz: build  ## random calls of every operator, valid and invalid, in a build with AddressSanitizer
	$(PYTHON) benchmarks/fuzz.py $(FUZZ_ARGS)

bench: build  ## CPU ratios against plain torch, to benchmarks/results/
	$(PYTHON) benchmarks/run_cpu.py

gpu: ## everything that a GPU can check and measure, in one call, to benchmarks/results/; without $(VENV): by python3
	$(if $(wildcard $(PYTHON)),$(PYTHON),python3) benchmarks/gpu.py

lint: build
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

clean:
	rm -rf build dist *.egg-info ribfast/_C*.so
