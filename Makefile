# make demo and make test set up .venv themselves; the second time they start at once.
.PHONY: demo test test-types test-engines test-logitcache test-trainer setup clean
PYTHON := .venv/bin/python
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest

test: setup
	tools/setup_browser.sh
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	@echo "types and three parts of the tests side by side, 5 to 20 minutes; each is shown when it is done"
	@$(MAKE) --no-print-directory --jobs 4 --output-sync=target test-types test-logitcache test-trainer test-engines

test-types:
	$(PYTHON) -m mypy

test-logitcache:
	$(PYTEST) tests --ignore tests/trainer -m "not engine and not programs"

test-trainer:
	$(PYTEST) tests/trainer -m "not engine and not programs"

# Real vLLM engines, gigabytes each, Ray, servers and browsers: one after the other.
test-engines:
	$(PYTEST) -m "engine or programs"

demo: setup
	tools/demo/run.sh

setup: .venv/.ready

.venv/.ready: pyproject.toml tools/setup.sh
	tools/setup.sh

clean:
	rm -rf .venv demo
