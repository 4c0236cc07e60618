# Every target works as the first command in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that test; each has four ranks of its own.
WORKERS ?= 3
READY := $(VENV)/.ready

.PHONY: demo test versions check format lint types mutants gpu bench wheels docs build clean

demo: $(READY)  ## train a small video transformer in one process, then over 2 ranks, and compare
	$(BIN)/python examples/train_sequence_parallel.py $(ARGS)

# The peers are optional: without them their tests are skipped, and say so.
test: $(READY)  ## every test that needs no GPU
	@$(MAKE) --no-print-directory wheels || echo "no wheels of the peers: their tests are skipped"
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

versions: $(READY)  ## the same on every supported pair of torch and triton
	@$(MAKE) --no-print-directory wheels || echo "no wheels of the peers: their tests are skipped"
	$(BIN)/python -m pip install --quiet -c constraints.txt --group versions
	$(BIN)/nox $(ARGS)

check: lint types test  ## what CI runs

format: $(READY)  ## rewrite the sources to the project's form
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: $(READY)  ## form and faults; rewrites nothing
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/lint-imports --no-logo

types: $(READY)  ## mypy, strict
	$(BIN)/mypy

mutants: $(READY)  ## single mistakes in pure modules, and which of them no test notices
	$(BIN)/python -m pip install --quiet -c constraints.txt --group mutants
	$(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results

gpu:  ## every test and benchmark that needs a GPU, with the given interpreter; installs nothing
	PYTHON=$(PYTHON) bash bench/run_gpu.sh $(ARGS)

bench: $(READY) .whl/.ready  ## every benchmark this machine can run
	$(BIN)/python bench/run.py $(ARGS)

wheels: .whl/.ready  ## the systems compared with, for bench and gpu

docs: $(READY)  ## the documentation, strict, in site/
	$(BIN)/python -m pip install --quiet -c constraints.txt --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(READY)  ## sdist and wheel in dist/
	$(BIN)/python -m build

clean:  ## remove what the targets above made
	rm -rf $(VENV) .nox .whl build dist site demo_output mutants *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

.whl/.ready: $(READY) pyproject.toml
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir .whl --group peers
	touch $@

# pip 25.1 is the first that reads dependency groups.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip==26.3"
	$(BIN)/python -m pip install --quiet -c constraints.txt --group dev -e .
	touch $@
