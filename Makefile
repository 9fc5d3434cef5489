# `make` lists the targets. `make demo` and `make test` work on a fresh machine: each makes what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# onnxruntime-gpu where an NVIDIA driver answers, onnxruntime elsewhere; never both.
RUNTIME := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP  := $(VENV)/.installed-$(RUNTIME)
IMAGES ?=
GOLDEN ?= tests/golden

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types contracts check bench docs golden

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## a virtual environment in .venv with everything

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); mimco needs Python 3.11 or newer: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(RUNTIME),train,export,eval,serve,tensorrt-rtx,dev]"
	@touch $@

demo: $(STAMP) ## train both stages, export, index and search; IMAGES=dir takes your own folder
	$(BIN)/python demo/run.py $(if $(IMAGES),--images "$(IMAGES)")

test: $(STAMP) ## the tests
	$(BIN)/python -m pytest

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict
	$(BIN)/mypy

contracts: $(STAMP) ## who may import whom
	$(BIN)/lint-imports

check: lint types contracts test ## all of it, as CI does

bench: $(STAMP) ## does it learn: k-NN of both stages, random weights and pixels (TRAIN=… VAL=… OUT=dir)
	@test -n "$(TRAIN)" -a -n "$(VAL)" -a -n "$(OUT)" \
	  || { echo 'make bench TRAIN="folders or tars of <class>/<picture>" VAL="the same" OUT=dir [ARGS=…]' >&2; exit 2; }
	$(BIN)/python benchmarks/learn_small.py --train $(TRAIN) --val $(VAL) --out "$(OUT)" $(ARGS)

golden: $(STAMP) ## the tests against the authors' numbers; GOLDEN=dir takes other seeds
	$(BIN)/python -m pytest -m golden --golden="$(GOLDEN)"

docs: $(STAMP) ## docs/cli.md, made from --help
	$(BIN)/python docs/make_cli.py
