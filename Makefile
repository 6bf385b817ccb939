# Every target sets up what it needs in .venv; PYTHON chooses the interpreter (3.10 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint format check bench bench-suite bench-gpu clean

demo: $(VENV)/.installed
	$(BIN)/headinfer demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test

bench: $(VENV)/.installed
	mkdir -p benchmarks/results
	for dtype in bfloat16 float32; do \
		$(BIN)/headinfer bench decode --dtype $$dtype --new-tokens 16 \
			--json benchmarks/results/cpu-decode-32k-$$dtype.json || exit 1; \
	done
	$(BIN)/python benchmarks/readme_table.py

bench-suite: $(VENV)/.installed-dev
	PYTHON=$(BIN)/python benchmarks/cpu.sh

bench-gpu: $(VENV)/.installed-dev
	PYTHON=$(BIN)/python benchmarks/gpu.sh

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), "Python 3.10 to 3.13 is needed; set PYTHON"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
