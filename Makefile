# Everything a newcomer needs: `make pipeline`, then `make test`.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install lint type test test-all pipeline study bench docs clean

install: .venv/.installed ## virtual environment with pinned versions

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

lint: install type ## formatting, lint rules, import layers, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

type: install
	$(BIN)/mypy

test: install ## the tests, in a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test-all: install ## the tests marked `long` too
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m ""

pipeline: install ## demo data, extract, distill, evaluate, report
	$(BIN)/python -m kdhiera.pipelines.demo

study: install ## docs/results.md; hours, stopped and called again it goes on
	$(BIN)/python -m kdhiera.pipelines.study

bench: install ## figures of docs/performance.md
	$(BIN)/python -m benchmarks

docs: install ## the documentation as a site in site/, links and snippets checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/pytest -q tests/test_docs.py tests/test_reference_page.py tests/integration/test_library_page.py

clean: ## environment and everything the demo made
	rm -rf .venv demo-data caches/demo runs/demo
