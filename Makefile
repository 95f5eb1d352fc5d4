# make pretrain | test | bench | check | format | sanitize | clean: each sets up .venv and builds csrc/ when needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
CONFIG ?= examples/tiny_deepseek.yaml
RESUME ?=
ARGS ?=
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(shell git ls-files '*csrc/*.cpp' '*csrc/*.h' '*csrc/*.cu' '*csrc/*.cuh')
export OMP_NUM_THREADS ?= 1

.PHONY: pretrain test bench check format sanitize clean

# The package list is installed when it changes, the extension is built when a source changes.
.venv/packages: requirements-dev.txt requirements-cuda.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check \
	  $$(grep -v '^#' requirements-cuda.txt | if command -v nvcc > /dev/null; then grep nvshmem; else cat; fi) \
	  || echo "no CUDA compiler or NVSHMEM: ep_megatron._cuda or _nvshmem may not be built, and their tests skipped"
	touch $@

.venv/built: .venv/packages setup.py pyproject.toml $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

# What tests run or read where it lies: unpacked and not installed, as the rest of it needs a GPU or much else.
build/sources: .venv/packages requirements-sources.txt
	for name in $$(cat requirements-sources.txt); do \
	  folder=build/sources/$$(echo $$name | sed s/==/-/) && mkdir -p $$folder build/wheels/$$name && \
	  $(BIN)/pip download --quiet --disable-pip-version-check --retries 1 --timeout 20 --no-deps -d build/wheels/$$name $$name && \
	  $(BIN)/python -m zipfile -e build/wheels/$$name/*.whl $$folder \
	  || echo "no sources of $$name: tests that need them will be skipped"; done
	touch $@

pretrain: .venv/built
	$(BIN)/ep-megatron pretrain --config $(CONFIG) $(if $(RESUME),--resume) $(ARGS)

test: check build/sources
	$(BIN)/pytest $(ARGS)

bench: .venv/built
	$(BIN)/ep-megatron bench $(ARGS)

check: .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/mypy

format: .venv/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# The multi-rank tests of shared memory against _cpu built with sanitizers, in a copy: not part of test.
SANITIZERS ?= address,undefined thread
SANITIZED ?= test_row_kernels test_fp8_kernels test_dispatch test_fp8_dispatch test_async test_settings test_capacity \
  test_low_latency test_low_latency_masks test_memory test_security test_errors test_statistics
sanitize: .venv/built
	for kind in $(SANITIZERS); do ./tests/sanitize.sh $$kind $(SANITIZED) || exit 1; done

clean:
	rm -rf .venv build *.egg-info ep_megatron/*.so
