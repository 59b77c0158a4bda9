# Needs Python 3.11 or newer and a package index, nothing else. Another interpreter: make PYTHON=python3.12 demo
PYTHON ?= python3
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check
REQUIRED := pyproject.toml constraints.txt

.PHONY: demo fast test lint docs wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@$(VENV)/bin/sparse-context demo --output demo

# The tests of one pipeline class go to one worker (loadgroup), where its pictures are made once.
WORKERS := 2
PYTEST := $(VENV_PYTHON) -m pytest -n $(WORKERS) --dist loadgroup

# Extra arguments for pytest: make test ARGS="tests/test_images.py -k bomb"
test: $(VENV)/.installed-test
	@$(PYTEST) $(ARGS)

# The idea, the layers and, of the pipelines, klein: under a minute
fast: $(VENV)/.installed-test
	@$(PYTEST) -m "not slow and (xdist_group(name='klein') or not xdist_group)" $(ARGS) \
		$(addprefix tests/test_,$(addsuffix .py,layers tokens budget selection selectors saliency images preview manifest \
		families context))

lint: $(VENV)/.installed-test
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

# Strictly, offline, and outside the tree of the pages: build/docs/index.html.
docs: $(VENV)/.installed-docs
	@$(VENV_PYTHON) docs/include.py --check
	@$(VENV_PYTHON) docs/generate.py
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict --site-dir build/docs
	@echo "wrote build/docs/index.html"

wheel: $(VENV)/.installed
	@$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

# Leaves .venv, which takes minutes to make again: remove that one by hand.
clean:
	rm -rf demo dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find sparse_context tests -name __pycache__ -type d -exec rm -rf {} +

# The stamps are older than the files they depend on whenever those change, so a second run reuses .venv as it is.
$(VENV)/.installed: $(REQUIRED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "sparse-context needs Python 3.11 or newer: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 \
		|| { echo "[1/3] Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "[2/3] Installing PyTorch into $(VENV) (the largest part: minutes, the first time)"
	@$(PIP) install --quiet --constraint constraints.txt torch
	@echo "[3/3] Installing sparse-context and the rest"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[diffusers]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "Installing what the pages need"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@
