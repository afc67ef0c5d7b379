# make demo and make test set up .venv themselves; the second time they start at once.
.PHONY: demo test test-engines test-others setup clean
PYTHON := .venv/bin/python

test: setup
	tools/setup_browser.sh
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	@echo "tests that start engines or other programs run beside all others, 5 to 20 minutes; each part is shown when it is done"
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-others test-engines

test-others:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "not engine and not programs"

# Real vLLM engines, gigabytes each, servers and browsers: one after the other.
test-engines:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "engine or programs"

demo: setup
	tools/demo/run.sh

setup: .venv/.ready

.venv/.ready: pyproject.toml tools/setup.sh
	tools/setup.sh

clean:
	rm -rf .venv demo
