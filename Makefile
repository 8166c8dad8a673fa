# make demo  - the whole main job on an embedded teacher, no network needed once the packages are installed
# make test  - lint, types, tests
PYTHON ?= python3
VENV ?= .venv
# Where there is no GPU and pip would fetch a CUDA build of torch:
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
BIN = $(VENV)/bin

.PHONY: demo test test-all lint clean

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt $(PIP_FLAGS) torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt $(PIP_FLAGS) -e ".[hf]"
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt $(PIP_FLAGS) -e ".[test]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/hxaconv demo demo-output

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) demo-output dist build
