# Rolecast: `make demo` shows it, `make test` tests it, `make help` lists the rest.
SHELL := /bin/sh
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v $$p; break; }; done)
ARGS ?=
STAMP = $(VENV)/.installed-$(shell cat requirements.lock requirements-test.lock pyproject.toml 2>/dev/null | cksum | cut -d' ' -f1)

.PHONY: help demo test check bench bench-full faults soak lock format screenshots clean

help:  ## list what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

demo: $(STAMP)  ## start everything with sample data and a local inbox (ARGS=--once: print the summary and end)
	@$(VENV)/bin/rolecast demo $(ARGS)

test: check  ## lint, types and every test
	@$(PY) -m pytest -n auto --dist loadfile $(ARGS)

check: $(VENV)/.test-$(notdir $(STAMP))  ## lint and types alone
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

bench: $(VENV)/.test-$(notdir $(STAMP))  ## how fast, beside smtp-source and others, and the goals: 15 minutes (ARGS="latency --recipients 20000")
	@$(PY) -m tests.bench $(ARGS)

bench-full: $(VENV)/.test-$(notdir $(STAMP))  ## the same up to 1,000,000 recipients, and urgent mail under three loads
	@$(PY) -m tests.bench --full $(ARGS)

faults: $(VENV)/.test-$(notdir $(STAMP))  ## every fault of the field, some 40 minutes (ARGS="kills-sqlite --kills 20"; --list names them)
	@$(PY) -m tests.faults $(ARGS)

soak: $(VENV)/.test-$(notdir $(STAMP))  ## the same with the large figures: hours
	@$(PY) -m tests.faults --soak $(ARGS)

format: $(VENV)/.test-$(notdir $(STAMP))  ## put the code into its form
	@$(VENV)/bin/ruff check --fix --quiet . ; $(VENV)/bin/ruff format .

screenshots: $(VENV)/.test-$(notdir $(STAMP))  ## make the README's picture again (needs a Chromium)
	@$(PY) -m tests.screenshots

lock: $(VENV)/.test-$(notdir $(STAMP))  ## pin every dependency by hash again
	@$(VENV)/bin/pip install --quiet pip-tools
	@$(VENV)/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url \
		--no-emit-find-links --no-header --no-annotate --build-deps-for editable -o requirements.lock pyproject.toml
	@$(VENV)/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url \
		--no-emit-find-links --no-header --no-annotate --extra test --extra browser -c requirements.lock \
		-o requirements-test.lock pyproject.toml

$(STAMP):
	@test -n "$(PYTHON)" || { echo "Rolecast needs Python 3.11 or newer: install it, or give PYTHON=/path/to/python" >&2; exit 2; }
	@echo "Making $(VENV) with the locked libraries (once, about half a minute) ..." >&2
	@$(PYTHON) -m venv $(VENV) || { echo "python -m venv failed: on Debian and Ubuntu install python3-venv" >&2; exit 2; }
	@rm -f $(VENV)/.installed-* $(VENV)/.test-*
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.test-$(notdir $(STAMP)): $(STAMP)
	@echo "Adding what the tests need (once) ..." >&2
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-test.lock
	@touch $@

clean:  ## remove what was made
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache
