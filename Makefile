# Two commands do all set-up: `make demo` and `make test`. Running them again costs seconds.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO_DIR ?= runs/demo
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: demo demo-ablation test lint format docs clean

demo: $(INSTALLED)
	$(BIN)/python -m tools.demo.run $(DEMO_DIR)

# Continues where the demo ended: a teacher without r_KL, and the best of several explanations without RL.
demo-ablation: $(INSTALLED)
	$(BIN)/python -m tools.demo.run $(DEMO_DIR) --ablation

test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python -m tools.docs.configuration
	$(BIN)/python -m tools.docs.commands
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "Open build/docs/index.html"

# torch comes first and pinned: an open range would replace the CPU build by gigabytes of CUDA packages.
$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "megatron-rlt needs Python 3.11, found " + sys.version.split()[0] + ": set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
