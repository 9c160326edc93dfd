# make demo | results | test | fuzz | faults | lint | docs | clean. Needs Python 3.11, 3.12 or 3.13 and nothing else; `make PYTHON=/path/to/python3.12 demo` chooses one.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Twice quiet: pip shows its errors and keeps its warnings about indexes to itself.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
# Python compiles what it imports; pip would compile all of torch, transformers and diffusers, for about half of the time.
INSTALL := $(PIP) install --no-compile --editable
# Empty is unset: without compiled files, every process would compile torch, transformers and diffusers again, for 6 seconds.
export PYTHONDONTWRITEBYTECODE :=
FIT := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

.PHONY: demo results test fuzz faults lint docs clean

demo: $(VENV)/.installed
	@$(BIN)/ddil demo $(ARGS)

# The five tables of the shapes world from nothing. It says first how long they take.
results: $(VENV)/.installed
	@$(BIN)/ddil recreate protocols/shapes/tables/all.yaml --out results/mine $(ARGS)

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

fuzz: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.fuzz $(ARGS)

# Stops commands, fills their disks and damages their files, many times. It takes about an hour on a quiet core.
faults: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.faults $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(BIN)/python -m ddil_eval.cli.command_reference
	$(BIN)/python -m ddil_eval.cli.protocol_reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
	find ddil_core ddil_eval tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# One pip call resolves torch and torchvision together, so that their builds match.
$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	@echo "Installing ddil into $(VENV); the first time takes some minutes." >&2
	@$(INSTALL) . && touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	@echo "Installing ddil and its development tools into $(VENV); the first time takes some minutes." >&2
	@$(INSTALL) '.[dev]' && touch $(VENV)/.installed $@

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/pip
	@echo "Installing ddil and its documentation tools into $(VENV); the first time takes some minutes." >&2
	@$(INSTALL) '.[docs]' && touch $(VENV)/.installed $@

$(BIN)/pip:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: there is no '$(PYTHON)' here; install Python 3.11, 3.12 or 3.13, or name one as in 'make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)'." >&2; exit 1; }
	@"$(PYTHON)" -c '$(FIT)' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1), and ddil needs Python 3.11, 3.12 or 3.13: name one as in 'make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)'." >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
