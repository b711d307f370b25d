# Two commands do all the set-up: `make demo` and `make test`. `make help` lists everything.

PYTHON ?= python3
# The PyTorch to install, and the package index to take it from if not pip's own. Without a GPU the CPU build is chosen
# by .ci/install_torch.py; for a certain CUDA build: make demo TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=
# Test processes; 0 runs all tests in one process. Each file's tests run in order in one process.
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint clean FORCE

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-6s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.demo ## open the Space on the packaged checkpoint (DEMO_ARGS)
	$(BIN)/boneage demo $(DEMO_ARGS)

test: lint ## format, lint, types, then all tests (PYTEST_ARGS, PYTEST_WORKERS)
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.test ## format, lint and types only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1 || { \
	    echo "error: Python 3.11 to 3.14 is needed, but $(PYTHON) is: $$($(PYTHON) --version 2>&1 || true);" \
	         "name another with 'make PYTHON=python3.12 ...'." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "error: no environment could be made; on Debian and Ubuntu install the package python3-venv first." >&2; exit 1; }
	@$(PIP) install --quiet --disable-pip-version-check --upgrade "pip>=25.1,<27"
	@touch $@

# Rewritten only when the choice differs from the one installed, so that a change of TORCH_SPEC or TORCH_INDEX takes effect.
$(VENV)/.torch-choice: $(VENV)/.python FORCE
	@echo '$(TORCH_SPEC) $(TORCH_INDEX)' | cmp -s - $@ || echo '$(TORCH_SPEC) $(TORCH_INDEX)' > $@

# PyTorch goes in first and alone: as a dependency of the package pip would fetch several GB of CUDA packages with it.
# The file names the build installed; as a constraint it keeps pip from replacing it below.
$(VENV)/torch.txt: $(VENV)/.torch-choice
	$(BIN)/python .ci/install_torch.py --index "$(TORCH_INDEX)" --constraint $@ "$(TORCH_SPEC)"

$(VENV)/.demo: pyproject.toml $(VENV)/torch.txt
	@echo "Installing boneage-hf and what it needs; the first time takes about a minute."
	@$(PIP) install --quiet --constraint $(VENV)/torch.txt --editable ".[train]"
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/torch.txt
	@echo "Installing boneage-hf, what it needs and the test tools; the first time takes about a minute."
	@$(PIP) install --quiet --constraint $(VENV)/torch.txt --editable ".[test]"
	@touch $@ $(VENV)/.demo
