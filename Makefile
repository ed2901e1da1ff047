# Everything below works on a fresh machine with Python 3.10-3.13, git, make and a compiler.
PYTHON ?= python3
CLUSTER ?= local
NODES ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test test-full lint format cluster-up cluster-down faults wheel clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.ready ## make .venv from the pinned constraints and install Paperscale into it

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"error: Python {v[0]}.{v[1]} found, 3.10 to 3.13 needed; try: make $(MAKECMDGOALS) PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt -e '.[dev]'
	touch $@

demo: setup ## the main job on real data: prepare, submit, interrupt, continue, finish (CLUSTER=slurm for SLURM)
	$(BIN)/paperscale demo --cluster $(CLUSTER)

test: setup lint ## lint, types and the tests (the SLURM tests are skipped, with the reason, where no cluster answers)
	$(BIN)/pytest -m 'not slow'

test-full: setup lint ## all tests, the slow ones too
	$(BIN)/pytest

lint: setup ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --strict cluster/dev/devcluster

format: setup ## put the code into format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

cluster-up: ## start a real SLURM of NODES nodes on this machine (installs it on Debian, as root)
	cluster/dev/devcluster up $(NODES)

cluster-down: ## stop it and remove every trace
	cluster/dev/devcluster down

faults: setup ## break the development cluster (3 nodes) in every way, and write what was measured into docs/faults.md
	rm -f $(VENV)/faults.jsonl
	PAPERSCALE_FAULTS=$(CURDIR)/$(VENV)/faults.jsonl $(BIN)/pytest tests/cluster/test_fault_matrix.py
	$(BIN)/python tests/cluster/fault_table.py $(VENV)/faults.jsonl docs/faults.md

wheel: setup ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## remove what was built; runs/ and data/ stay
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
