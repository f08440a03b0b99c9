# Every command makes the environment (.venv) by itself when it is missing or pyproject.toml has changed.
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check format docs docs-serve readme bench clean distclean env
MAKEFLAGS += --no-print-directory

PY := .venv/bin/python
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest

.venv/.ready: pyproject.toml .ci/env
	@.ci/env

env: .venv/.ready  ## make or update the environment

help:  ## show this
	@echo "subquad: sub-quadratic attention for PyTorch"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: .venv/.ready  ## swap, distil and measure SmolLM2-135M; writes demo-out/report.html
	@OMP_WAIT_POLICY=passive $(PY) -m subquad.demo  # threads that wait leave the cores to others: three times as fast on a busy machine

test: .venv/.ready  ## all tests but the slow ones
	@$(PYTEST) -n $(WORKERS) -m "not slow"

test-slow: .venv/.ready  ## the slow tests
	@$(PYTEST) -n $(WORKERS) -m slow

check: .venv/.ready  ## format, lint, types and the fast tests, without the interpreted kernels: before each commit
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@$(PY) docs/readme.py --check
	@$(PYTEST) -n $(WORKERS) -m "not slow" --ignore-glob="*_kernels.py" tests/ops tests/test_contract.py tests/test_package.py tests/test_docs.py

format: .venv/.ready  ## rewrite the code in the project's format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

docs: .venv/.ready  ## build the documentation into site/
	@$(PY) docs/readme.py
	@$(PY) -m mkdocs build --strict --quiet
	@echo "site/index.html is ready"

docs-serve: .venv/.ready  ## show the documentation at http://localhost:8000
	@$(PY) -m mkdocs serve

bench: .venv/.ready  ## check and time the plain-torch forms on this CPU; writes benchmarks/results/
	@$(PY) benchmarks/cpu_forms.py

clean:  ## remove caches and what was built (the environment and the demo's output stay)
	@rm -rf site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	@find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +

distclean: clean  ## also remove the environment and the demo's output
	@rm -rf .venv demo-out
