# Everything below makes what it needs: `make test` on a fresh machine with Python 3.11 or 3.12 is enough.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and pinned: a later requirement must find it there, not bring another build.
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)",/\1/p' pyproject.toml)
TRITON := $(shell sed -n 's/^triton = \["\(triton[^;]*\);.*/\1/p' pyproject.toml)

# Photographs go to a dataset of their own, named after their folder.
DEMO_IMAGES = $(if $(IMAGES),--images "$(abspath $(IMAGES))" --dataset_uri "outputs/demo-$(notdir $(abspath $(IMAGES)))")

.PHONY: help install demo test test-kernels test-cluster test-image lint format benchmark lock clean

help:
	@echo "make demo          set up $(VENV), then run the full pipeline once: raw images -> a trained model -> its pictures"
	@echo "                   IMAGES=folder takes your own images, OPTIONS='--world.num_images 200' changes the configuration"
	@echo "make test          set up $(VENV), check style and types, run the tests (not those marked slow or gpu)"
	@echo "make test-kernels  the fused GPU kernels, by Triton's interpreter on the CPU, and compiled for a Hopper card without one"
	@echo "make test-cluster  as root on Linux: jobs on four hosts (network namespaces), some of which are lost on the way"
	@echo "make test-image    as root on Linux: build the images cpu and mlflow, run the demo and MLflow in them (half an hour)"
	@echo "make lint          ruff (lint and format) and mypy"
	@echo "make format        let ruff put the style right"
	@echo "make benchmark     our model against diffusers on this machine"
	@echo "make lock          pin anew what the container images hold"
	@echo "make clean         remove $(VENV) and caches"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), f"Python 3.11 or 3.12 is needed, this is {sys.version.split()[0]}: make PYTHON=python3.11 ..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/python -m jobs.demo --config jobs/configs/demo.yaml $(DEMO_IMAGES) $(OPTIONS)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_OPTIONS)

# Triton takes 1 GB, and torch would import it in every process that found it: only these tests do.
.venv-triton/installed: pyproject.toml
	rm -rf .venv-triton
	$(BIN)/pip install --quiet --no-deps --target .venv-triton "$(TRITON)"
	touch $@

test-kernels: install .venv-triton/installed
	PYTHONPATH=.venv-triton $(BIN)/python -m pytest -m "not gpu" tests/sana_model/kernels $(PYTEST_OPTIONS)

test-cluster: install
	$(BIN)/python -m pytest -m "cluster and not slow" tests/cluster $(PYTEST_OPTIONS)

test-image: install
	$(BIN)/python -m infra.images $(OPTIONS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: install
	$(BIN)/python -m jobs.benchmark model

lock: install
	PATH="$(CURDIR)/$(BIN):$$PATH" infra/docker/lock.sh

clean:
	rm -rf $(VENV) .venv-triton .pytest_cache .mypy_cache .ruff_cache *.egg-info
