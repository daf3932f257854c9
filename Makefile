# `make demo` and `make test` work as the first command in a fresh clone: they make the environment when it is missing.
VENV ?= .venv
PYTHON ?= python3
READY := $(VENV)/.ready
LOWEST ?= .venv-lowest

.PHONY: demo test test-lowest check lint bench clean

demo: $(READY)  ## The whole product on the built-in world, without a network
	$(VENV)/bin/clipray demo runs/demo

test: $(READY)  ## All tests, two files at a time (tests/conftest.py says which)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n 2 --no-loadscope-reorder

test-lowest: $(LOWEST)/.ready  ## The unit tests on the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest -q -n 2 --no-loadscope-reorder tests/unit

check: lint  ## Style, types and the unit tests that need no Ray: the inner loop, two minutes
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --no-loadscope-reorder -m "not ray" tests/unit tests/test_architecture.py tests/test_project_files.py

lint: $(READY)  ## Style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(READY)  ## The benchmarks of benchmarks/README.md
	$(VENV)/bin/python benchmarks/embed.py

clean:
	rm -rf runs dist .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt --editable ".[test]"
	touch $@
