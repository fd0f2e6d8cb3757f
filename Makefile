# `make` lists the targets. Every target does its own set-up: a .venv with the pinned requirements, installed once.
PYTHON ?= python3
MINUTES ?= 20
SLOW_MINUTES ?= 600
BIN := .venv/bin
STAMP := .venv/.installed
PINS := requirements.txt requirements-dev.txt constraints.txt

.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -c constraints.txt
	@touch $(STAMP)

install: $(STAMP)  ## the virtual environment with the pinned requirements

demo: $(STAMP)  ## the whole path on rendered faces: data to samples (MINUTES=20)
	$(BIN)/python demo.py --minutes $(MINUTES)

test: $(STAMP)  ## lint, types and the default tests (below 10 minutes on 2 cores)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

test-slow: $(STAMP)  ## the tests that take minutes; what would begin after SLOW_MINUTES is skipped
	$(BIN)/python -m pytest -m "slow and not gpu" --durations=10 --minutes $(SLOW_MINUTES)

test-gpu: $(STAMP)  ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

bench-gpu: $(STAMP)  ## training speed on a GPU, at the widths of the presets
	$(BIN)/python -m benchmarks.unet gpu

format: $(STAMP)  ## format and sort imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: help install demo test test-slow test-gpu bench-gpu format
