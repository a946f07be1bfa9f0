# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DCLINT := $(VENV)/node/node_modules/.bin/dclint

.PHONY: help install demo test test-slow lint lint-compose format benchmark clean

help:
	@echo "make demo       train, attack, report: runs/demo/report.html"
	@echo "make test       the tests (under 15 minutes on 2 cores)"
	@echo "make test-slow  the long ones: whole Flower engines, 50 clients"
	@echo "make lint       ruff, mypy --strict, import contracts, Dockerfile and compose files"
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
	$(BIN)/hadolint docker/Dockerfile
	$(MAKE) --no-print-directory lint-compose

# dclint checks compose files against the schema; it comes from npm, and without npm the tests still read every file.
lint-compose: $(STAMP)
	@if command -v npm > /dev/null; then \
		test -x $(DCLINT) || npm install --silent --no-fund --no-audit --prefix $(VENV)/node dclint@3.1.0; \
		site=$$(mktemp -d) && $(BIN)/python -m experiments.compose --clients 3 $$site \
		&& $(DCLINT) --quiet docker/compose.yml docker/compose.gpu.yml $$site/clients.yml; \
		code=$$?; rm -rf "$$site"; exit $$code; \
	else echo "no npm here: compose files are not checked against the schema"; fi

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[dev,benchmark]"
	$(BIN)/python -m experiments.benchmark

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
