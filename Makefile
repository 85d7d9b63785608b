# Two commands for a fresh machine with Python 3.11 to 3.14: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/
# A file of versions that pip must take, such as constraints/known-good-py311.txt.
CONSTRAINTS ?=
PIP_INSTALL := $(RUN)python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: quickstart test types all-tests test-slow docs docs-serve check format install clean

quickstart: $(VENV)/.installed
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/quickstart.sh

test: $(VENV)/.installed-test
	$(RUN)ruff format --check .
	$(RUN)ruff check .
	@$(MAKE) --no-print-directory --jobs 2 types all-tests

# At the same time, because some tests wait for other programs.
types:
	$(RUN)pyright
all-tests:
	$(RUN)python -m pytest -q -n 2 --dist loadfile

test-slow: $(VENV)/.installed-test
	$(RUN)python -m pytest -q -m slow

# The documentation site, in site/: every link and every anchor has to be there.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN)python -m mkdocs build --strict

docs-serve: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN)python -m mkdocs serve --livereload

format: $(VENV)/.installed-test
	$(RUN)ruff format .
	$(RUN)ruff check --fix .

# Asks pip again, because other constraints may be wanted than before.
install:
	rm -f $(VENV)/.installed $(VENV)/.installed-test
	$(MAKE) $(VENV)/.installed-test

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 14) and \
	  f"Python 3.11 to 3.14 is needed, {sys.executable} is {v[0]}.{v[1]}; set PYTHON=python3.12")'
	test -x $(RUN)python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) site runs/quickstart data/quickstart .pytest_cache .ruff_cache .hypothesis *.egg-info
