# Two commands: `make quickstart` and `make test`. Each sets up what it needs in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA GPU, torch is pinned to a version that has a CPU build; with one, pip chooses (see README).
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)

.PHONY: quickstart test setup lint schema clean

quickstart: setup
	$(BIN)/accelerate launch --quiet train.py --config configs/quickstart.yaml

test: setup
	$(BIN)/ruff check .
	$(BIN)/pytest

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[test]'
	touch $@

schema: setup
	$(BIN)/limbeck schema configs/experiment.schema.json

clean:
	rm -rf $(VENV) runs
