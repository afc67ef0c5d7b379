# make demo and make test set up .venv themselves; the second time they start at once.
.PHONY: demo test test-engines test-trainer test-logitcache test-types test-programs setup clean
PYTHON := .venv/bin/python
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest

test: setup
	tools/setup_browser.sh
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	@echo "five parts, three at a time, 5 to 20 minutes; each is shown when it is done"
	@$(MAKE) --no-print-directory --keep-going --jobs 3 --output-sync=target \
		test-engines test-trainer test-logitcache test-types test-programs

# Real vLLM engines, gigabytes each, and Ray: one after the other.
test-engines:
	$(PYTEST) -m engine

test-trainer:
	$(PYTEST) tests/trainer -m "not engine and not programs"

test-logitcache:
	$(PYTEST) tests --ignore tests/trainer -m "not engine and not programs"

test-types:
	$(PYTHON) -m mypy

# Servers, a browser, whole commands on several ranks.
test-programs:
	$(PYTEST) -m "programs and not engine"

demo: setup
	tools/demo/run.sh

setup: .venv/.ready

.venv/.ready: pyproject.toml tools/setup.sh
	tools/setup.sh

clean:
	rm -rf .venv demo
