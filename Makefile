# Two commands for a fresh machine with Python 3.11 or 3.12: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/

.PHONY: quickstart test test-slow check format install clean

quickstart: $(VENV)/.installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/quickstart.sh

test: $(VENV)/.installed-test
	$(RUN)ruff format --check .
	$(RUN)ruff check .
	$(RUN)pyright
	$(RUN)python -m pytest -q -n 2 --dist loadfile

test-slow: $(VENV)/.installed-test
	$(RUN)python -m pytest -q -m slow

format: $(VENV)/.installed-test
	$(RUN)ruff format .
	$(RUN)ruff check --fix .

install: $(VENV)/.installed-test

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and \
	  f"Python 3.11 or 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}; set PYTHON=python3.12")'
	test -x $(RUN)python || $(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN)python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs/quickstart data/quickstart .pytest_cache .ruff_cache .hypothesis *.egg-info
