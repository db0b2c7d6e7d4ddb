# Each target does its own set-up; the second call finds it done.
#
#   make demo        a picture of which cross-attention heads of a small BLIP carry the answer
#   make test        the tests, without the slow ones
#
#   PYTHON=python3.12     the interpreter that makes .venv (3.11 or later)
#   TORCH_INDEX=URL       where torch comes from, e.g. https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2
DEMO ?= demo
TOYS ?= toy-blip-itm toy-blip-vqa toy-blip-captioning toy-albef toy-clip toy-clip-resnet toy-llava

# Tests of whole methods on whole models, which take five times as long when every shape is checked.
# Run by hand without these targets, they are checked, too.
UNTYPED := tests/test_planted.py tests/test_validate.py tests/test_notice_report.py \
	tests/test_runs_notice.py tests/test_cli_runs.py tests/test_causal_tracing.py \
	tests/test_notice.py tests/test_functions.py
WITHOUT_TYPES := --override-ini=addopts= --strict-config --strict-markers -ra

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.PHONY: help demo test test-slow lint format docs bench toys planted clean
.DEFAULT_GOAL := help

help:
	@echo "make demo | test | test-slow | lint | format | docs | bench | toys | planted | clean"

demo: $(READY)
	$(BIN)/hooked-vlm patch --model toy-blip-itm --out $(DEMO)
	@echo "The pictures are in $(DEMO)/:" && ls $(DEMO)/*.png

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) $(UNTYPED:%=--ignore=%)
	$(BIN)/python -m pytest -n $(WORKERS) $(WITHOUT_TYPES) -m 'not slow' $(UNTYPED)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(UNTYPED:%=--ignore=%)
	$(BIN)/python -m pytest -m slow $(WITHOUT_TYPES) $(UNTYPED)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# The site, then every example in the docs and the docstrings, run.
docs: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --doctest-modules --doctest-glob='*.md' \
		hooked_vlm weights_conversion docs
	@echo "The pages are in docs/_build/html/index.html"

bench: $(READY)
	@set -e; for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script; done

# Trains the packaged checkpoints again, from their seeds: half an hour, bit for bit.
toys: $(READY)
	@set -e; for toy in $(TOYS); do $(BIN)/python -m hooked_vlm.toys.train $$toy --threads 1; done

# Builds the planted models again, and the page that says what methods find in them.
planted: $(READY)
	$(BIN)/python -m hooked_vlm.planted.build
	$(BIN)/hooked-vlm validate --out docs/validation.parquet --page docs/validation.md

clean:
	rm -rf $(VENV) $(DEMO) build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone, so that it can come from another index; the rest from the pins.
# Built without isolation, so that the build backend is the pinned one too.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or later; name one: make PYTHON=python3.11 …"; exit 1; }
	@echo "Setting up $(VENV); the first time this downloads torch and takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),-c constraints.txt) $(TORCH)
	@$(PIP) install -c constraints.txt hatchling editables
	@$(PIP) install -c constraints.txt --no-build-isolation --editable '.[dev,docs]'
	@touch $@
