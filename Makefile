# Every target sets up .venv itself; the second time it starts at once.
.PHONY: check demo test test-fast test-fast-trainer test-fast-logitcache test-engines test-trainer test-logitcache test-types test-programs setup setup-light clean
PYTHON := .venv/bin/python
# Set-up leaves Python's files uncompiled. Without this, each process would compile all that it imports for itself alone.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := env OMP_NUM_THREADS=1 $(PYTHON) -m pytest
FAST := not engine and not programs and not slow and not matrix
# Files of engines only would import vLLM.
NOT_TRAINER = tests --ignore tests/trainer \
	$$(grep -rl --include=*.py '^pytestmark.*mark.engine' tests | sed 's/^/--ignore /')

test: setup
	tools/setup_browser.sh
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	@echo "five parts, three at a time, about ten minutes; each is shown when it is done"
	@$(MAKE) --no-print-directory --keep-going --jobs 3 --output-sync=target \
		test-engines test-logitcache test-trainer test-programs test-types

# Real vLLM engines, gigabytes each, and Ray: one after the other, and so the longest part, to which the others give way.
# Only files that have such tests are collected.
test-engines:
	$(PYTEST) -m engine $$(grep -rl --include=*.py mark.engine tests)

test-trainer:
	nice $(PYTEST) tests/trainer -m "not engine and not programs and not matrix"

test-logitcache:
	nice $(PYTEST) $(NOT_TRAINER) -m "not engine and not programs and not matrix"

test-types:
	$(PYTHON) -m mypy

# Servers, a browser, whole commands on several ranks.
test-programs:
	nice $(PYTEST) -m "programs and not engine and not matrix" $$(grep -rl --include=*.py mark.programs tests)

# What a change passes before it is committed: no engine, no whole command, no slow test. A process a package, which no
# other imports again.
check: setup-light
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	@$(MAKE) --no-print-directory --keep-going --jobs 3 --output-sync=target \
		test-types test-fast-trainer test-fast-logitcache

test-fast: test-fast-trainer test-fast-logitcache

test-fast-trainer:
	$(PYTEST) -q tests/trainer -m "$(FAST)"

test-fast-logitcache:
	$(PYTEST) -q $(NOT_TRAINER) -m "$(FAST)"

demo: setup
	tools/demo/run.sh

setup: .venv/.ready

.venv/.ready: pyproject.toml tools/setup.sh
	tools/setup.sh

# An environment without engines, for whoever changes what needs none.
setup-light: .venv/.light

.venv/.light: pyproject.toml tools/setup.sh
	tools/setup.sh $(if $(wildcard .venv/.ready),,light)

clean:
	rm -rf .venv demo
