# Two commands: `make quickstart` and `make test`. Each sets up what it needs in .venv first.
# `make docs` builds the documents as a site, and fails where a link leads nowhere.
# `make faults` kills, stops and starves real runs and prints what became of them; FAULTS="--short" does a few of each.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA GPU, torch is pinned to a version that has a CPU build; with one, pip chooses (see README).
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)

.PHONY: quickstart test test-long test-fast typecheck faults docs setup schema clean

quickstart: setup
	$(BIN)/accelerate launch --quiet --config_file launch/one_process.yaml train.py --config configs/quickstart.yaml

test: setup typecheck
	$(BIN)/ruff check .
	$(BIN)/pytest -m "not long"

# The rest: whole runs on several processes, budgets and engines on many models, faults. Continuous integration runs both.
test-long: setup
	$(BIN)/pytest -m long

typecheck: setup
	$(BIN)/mypy

# For daily work: without the tests that take long by tests/durations.json (`pytest --record-durations` writes it anew).
test-fast: setup
	$(BIN)/ruff check .
	$(BIN)/pytest -m "not slow"

faults: setup
	$(BIN)/python -m benchmarks.faults $(FAULTS)

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[test]'
	touch $@

docs: setup
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m docs.generate
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/_build/html
	@echo "the site is docs/_build/html/index.html"

schema: setup
	$(BIN)/limbeck schema configs/experiment.schema.json
	$(BIN)/limbeck schema configs/sweep.schema.json --sweep

clean:
	rm -rf $(VENV) runs
