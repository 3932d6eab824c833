# Two commands: `make demo` and `make test`. Both make the environment they need.
.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-kernels lint types unit train

# A Python that already has every package (a GPU image, an active environment) is used as it is;
# otherwise .venv is made from a Python 3.12 or newer.
READY_PYTHON := $(shell python3 tools/environment.py 2>/dev/null)
ifeq ($(READY_PYTHON),)
PYTHON := .venv/bin/python
ENVIRONMENT := .venv/.ready
else
PYTHON := $(READY_PYTHON)
ENVIRONMENT :=
endif

# A comma that the functions of make do not see.
COMMA := ,

# The packages of the machine's own driver, if it has one.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1)
CUDA := $(if $(DRIVER),$(COMMA)$(if $(shell [ $(DRIVER) -ge 580 ] && echo new),cuda13,cuda12),)
# Processes that run tests; on a GPU they share its memory.
WORKERS := $(if $(DRIVER),8,auto)

help:
	@echo "make demo   generate text with the example model (ARGS=... for its options, see ARGS=--help)"
	@echo "make test   lint, types and tests (TESTS=... for some of them)"
	@echo "make test-oldest  the tests on JAX $(OLDEST_JAX), in an environment of its own"
	@echo "make test-kernels  compile the kernels for an H200 with the newest JAX, without a GPU"
	@echo "make train  train the example model again; wants a GPU"

# The oldest JAX that pyproject.toml admits.
OLDEST_JAX := 0.11.2

define make_venv
	@base=""; for name in python3.12 python3.13 python3.14 python3 python; do \
	  if $$name -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then base=$$name; break; fi; \
	done; \
	if [ -z "$$base" ]; then echo "jmla needs Python 3.12 or newer on the PATH; found none." >&2; exit 1; fi; \
	echo "making $(@D) with $$($$base --version)"; $$base -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable $(1)
	@touch $@
endef

.venv/.ready: pyproject.toml
	$(call make_venv,".[dev$(CUDA)]")

.venv-oldest/.ready: pyproject.toml
	$(call make_venv,".[test$(COMMA)aot]" $(foreach name,jax jaxlib jax-cuda13-plugin jax-cuda13-pjrt,$(name)==$(OLDEST_JAX)))

.venv-kernels/.ready: pyproject.toml
	$(call make_venv,".[test$(COMMA)aot]")

demo: $(ENVIRONMENT)
	$(PYTHON) -m examples.decode_loop $(ARGS)

train: $(ENVIRONMENT)
	$(PYTHON) -m examples.train $(ARGS)

test: lint types unit

lint: $(ENVIRONMENT)
	@if $(PYTHON) -m ruff --version >/dev/null 2>&1; then \
	  $(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .; \
	else echo "lint skipped: ruff is not installed for $(PYTHON)"; fi

types: $(ENVIRONMENT)
	@if $(PYTHON) -m mypy --version >/dev/null 2>&1; then $(PYTHON) -m mypy; \
	else echo "types skipped: mypy is not installed for $(PYTHON)"; fi

unit: $(ENVIRONMENT)
	$(PYTHON) -m pytest -n $(WORKERS) $(TESTS)

# With XLA's CUDA compiler beside it, which needs no GPU: the programs are compiled for an H200, too.
# What the emulator runs is numpy's, whatever the JAX: `make test` is enough for that.
test-oldest: .venv-oldest/.ready
	JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 .venv-oldest/bin/python -m pytest -n $(WORKERS) $(or $(TESTS),--ignore=tests/emulator)

test-kernels: .venv-kernels/.ready
	JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 .venv-kernels/bin/python -m pytest -n $(WORKERS) tests/aot/test_kernels.py
