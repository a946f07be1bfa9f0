# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test test-slow lint format benchmark clean

help:
	@echo "make demo       train, attack, report: runs/demo/report.html"
	@echo "make test       the tests (under 15 minutes on 2 cores)"
	@echo "make test-slow  the long ones: whole Flower engines, 50 clients"
	@echo "make lint       ruff, mypy --strict, import contracts"
	@echo "make benchmark  seconds and PSNR beside the figures of the field's tools"
	@echo "make clean      remove .venv and caches (runs/ is yours)"

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(STAMP)

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/fedattack run experiments/recipes/demo.toml --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[dev,benchmark]"
	$(BIN)/python -m experiments.benchmark

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
