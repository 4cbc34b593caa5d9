# make demo            sets up .venv on first use and runs the main job on the GPU, or on NumPy
# make test            lint, every test that needs no GPU, every kernel compile
# make test-gpu        the tests that launch kernels            (one NVIDIA GPU)
# make test-multigpu   the tests of several GPUs, under mpirun and without it  (NUM_GPUS=2)
# make bench           times the layer; BENCH=gemm|error|startup is another bench; ARGS="..." goes to it
# make lint            ruff, mypy, clang-format: report only
# make format          ruff and clang-format: rewrite
# make clean           removes caches and build outputs; distclean removes .venv too
#
# CUDA=cu12|cu13|none  the CUDA extra to install; found from the driver when not given
# EXTRAS=jax,mpi       further extras of pyproject.toml
# MPIRUN="srun -n 2"   what starts the ranks of test-multigpu
# NO_VENV=1            install nothing and use PYTHON as it is
# PYTHON, VENV, ARGS   interpreter, folder of the environment, arguments for the command

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?=
ARGS ?=
BENCH ?= layer
NUM_GPUS ?= 2
MPIRUN ?= mpirun -n $(NUM_GPUS)
MAX_JOBS ?= 8

comma := ,
empty :=
space := $(empty) $(empty)

# The CUDA major that the driver supports, from the head of nvidia-smi or else from the driver's version
# (525 and later run CUDA 12, 580 and later CUDA 13). Empty without a driver.
define find_cuda
major="$$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Za-z ]*Version: *\([0-9][0-9]*\).*/\1/p' | head -n 1)"; \
if [ -z "$$major" ] && [ -r /proc/driver/nvidia/version ]; then \
  driver="$$(sed -n 's/^NVRM.* \([0-9][0-9]*\)\.[0-9][0-9.]* .*/\1/p' /proc/driver/nvidia/version)"; \
  if [ "$${driver:-0}" -ge 580 ]; then major=13; elif [ "$${driver:-0}" -ge 525 ]; then major=12; fi; \
fi; \
if [ "$${major:-0}" -ge 13 ]; then echo cu13; elif [ "$${major:-0}" -eq 12 ]; then echo cu12; fi
endef

ifdef NO_VENV
override VENV :=
endif

ifeq ($(VENV),)
PY := $(PYTHON)
BIN :=
else
PY := $(VENV)/bin/python
BIN := $(VENV)/bin/
ifeq ($(filter cu12 cu13 none,$(CUDA)),)
ifeq ($(origin CUDA),command line)
$(error CUDA: expected cu12, cu13 or none, got $(CUDA))
endif
CUDA := $(shell $(find_cuda))
endif
endif

# Every environment of one machine has the same CUDA extra: the two majors of CuPy exclude each other.
# Tests compile kernels, which needs NVRTC but no driver, so they fall back to cu12.
cuda := $(filter-out none,$(CUDA))
test_cuda := $(filter-out none,$(or $(CUDA),cu12))
with_extras = $(subst $(space),$(comma),$(strip $(1) $(subst $(comma),$(space),$(EXTRAS))))
stamp = $(if $(VENV),$(VENV)/.stamp-$(or $(call with_extras,$(1)),base))

base_env := $(call stamp,$(cuda))
test_env := $(call stamp,$(test_cuda) test)
bench_env := $(call stamp,$(test_cuda) bench)
mpi_env := $(call stamp,$(test_cuda) test mpi nccl-$(test_cuda))

.PHONY: help demo test test-gpu test-multigpu bench lint format clean distclean

help:
	@sed -n '/^# /s/^# //p; /^$$/q' $(firstword $(MAKEFILE_LIST))

demo: $(base_env)
	$(PY) -m cumoe demo $(ARGS)

test: lint
	$(PY) -m pytest -n auto --maxprocesses $(MAX_JOBS) --dist worksteal $(ARGS)

# Most of their time is compiling, so several processes share the GPU.
test-gpu: $(test_env)
	$(PY) -m pytest -m "gpu and not multigpu" -n auto --maxprocesses $(MAX_JOBS) --dist loadscope $(ARGS)

# First the tests of MPI, then those that start ranks themselves. A rank that fails must end (-x), which
# makes mpirun end the others. For root, and for more ranks than cores, Open MPI wants to be told; other
# launchers do not read these variables.
mpi_settings = OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe \
	$(if $(filter 0,$(shell id -u)),OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1)

test-multigpu: $(mpi_env)
	@command -v $(firstword $(MPIRUN)) >/dev/null || { \
	  echo "test-multigpu: $(firstword $(MPIRUN)) is not found; install Open MPI or MPICH, or set MPIRUN" >&2; \
	  exit 1; }
	$(mpi_settings) $(MPIRUN) $(PY) -m pytest -m multigpu -x -p no:cacheprovider $(ARGS)
	$(PY) -m pytest -m multigpu $(ARGS)

bench: $(bench_env)
	$(PY) -m bench.bench_$(BENCH) $(ARGS)

lint: $(test_env)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(call clang_format,--dry-run -Werror)

format: $(test_env)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(call clang_format,-i)

clang_format = find cumoe/cu tests/cu tests/host \( -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' \) \
	-print0 \
	| xargs -0 -r $(BIN)clang-format $(1)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find cumoe bench tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv

# One stamp for each set of extras: the environment is brought up to date when pyproject.toml changes.
ifneq ($(VENV),)
other_cuda = $(if $(findstring cu12,$*),cu13,$(if $(findstring cu13,$*),cu12,none))
$(VENV)/.stamp-%: pyproject.toml
	@if compgen -G "$(VENV)/.stamp-*$(other_cuda)*" >/dev/null; then \
	  echo "$(VENV) was made with $(other_cuda) and cannot hold both: run 'make distclean' first, or set VENV" >&2; \
	  exit 1; fi
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment: it needs the venv module and Python 3.10 or later" >&2; \
	  exit 1; }
	@echo "installing cumoe and its dependencies into $(VENV) ($*)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e ".$(patsubst %,[%],$(filter-out base,$*))"
	@touch $@
endif
