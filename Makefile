# Thin: each target is one or two lines. `make demo` and `make test` set up their own environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
REPORT ?= docs/benchmarks
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-slow test-versions test-gpu faults check fix docs bench

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'qtip needs Python 3.11 or newer: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/qtip demo --out demo-run

test: setup
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

# The oldest, a middle and the newest transformers (tests/versions/environments.py says which), each in an environment below .venvs.
test-versions: setup
	PYTHONPATH=src:kernels:tests $(BIN)/python -m versions

# On a machine with a GPU, uninstalled: needs torch, triton, numba, pytest and transformers in PYTHON, nothing else and no network.
test-gpu:
	PYTHONPATH=src:kernels:tests$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m gpu_report --out $(REPORT)

# 500 accidents, each of which must end in the same bytes or in a clear refusal; half an hour on two cores. Some need root (small disks).
faults: setup
	PYTHONPATH=src:kernels:tests $(BIN)/python -m faults --count 500 --jobs 2 --json docs/benchmarks/faults.json

check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

fix: setup
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

docs: setup
	$(BIN)/python docs/commands.py

bench: setup
	mkdir -p docs/benchmarks
	for what in distortion encode matvec; do $(BIN)/qtip bench $$what --json > docs/benchmarks/$$what.json || exit 1; done
