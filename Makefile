# Everything a contributor needs. `make setup` once, then any of the others.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test servers check lint types docs bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	touch $@

demo: setup
	$(BIN)/python examples/kill_and_resume.py --out out/demo

# Compiled ahead for the thousand processes that tests start, also where PYTHONDONTWRITEBYTECODE is set.
test: setup lint types
	$(BIN)/python -m compileall -q src tests bench
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The promises of a store on Azurite, SeaweedFS and rclone, which are installed for it beside the environment.
servers: setup
	HOLDFAST_SERVERS=1 $(BIN)/python -m pytest tests/stores/test_other_servers.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Side by side: each takes one core.
types: setup
	$(BIN)/mypy & mypy=$$!; $(BIN)/pyright; found=$$?; wait $$mypy && exit $$found

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.ready-bench
	$(BIN)/python -m bench --out out/bench

$(VENV)/.ready-bench: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group bench
	touch $@

# Every fault at every call, many more seeds and images than in the suite, and the page that says what was tried.
campaign: $(VENV)/.ready-bench
	rm -rf out/campaign
	mkdir -p out/campaign
	HOLDFAST_CAMPAIGN=long HOLDFAST_LEDGER=$(CURDIR)/out/campaign $(BIN)/python -m pytest -n 2 --dist worksteal tests/crash tests/stateful --deselect tests/crash/test_fault_matrix.py
	$(BIN)/python tests/crash/others.py out/campaign/others.json
	PYTHONPATH=tests $(BIN)/python -m crash.fault_matrix out/campaign out/campaign/others.json docs/fault-matrix.md

clean:
	rm -rf $(VENV) build dist site out runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
