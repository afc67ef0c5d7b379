# make demo and make test set up .venv themselves; the second time they start at once.
.PHONY: demo test setup clean
PYTHON := .venv/bin/python

test: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest

demo: setup
	tools/demo/run.sh

setup: .venv/.ready

.venv/.ready: pyproject.toml tools/setup.sh
	tools/setup.sh

clean:
	rm -rf .venv demo
