# The habits of this project. Everything runs in a virtual environment that is made on first use.
PYTHON ?= python3
VENV ?= .venv
# What pip is asked for, e.g. TORCH="torch==2.13.0" TRANSFORMERS="transformers==5.17.0"
TORCH ?= torch>=2.10
TRANSFORMERS ?= transformers>=5.17

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test bench lint install clean

demo: install
	$(BIN)/nbl demo --overwrite

test: install
	$(BIN)/python -m pytest

bench: install
	$(BIN)/python -m pytest --benchmark

lint: install
	$(BIN)/python -m pip install --quiet ruff==0.17.6 clang-format==23.1.5  # formats differ between versions
	$(BIN)/ruff check --no-cache .  # a cache would miss what new files change in others
	$(BIN)/ruff format --no-cache --check .
	find csrc tests benchmarks -regex '.*\.\(h\|cuh\|cpp\|cu\)' | xargs $(BIN)/clang-format --dry-run --Werror

install: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "$(TRANSFORMERS)" "setuptools>=68" wheel ninja pybind11
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,report]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info nbl_kernels/*.so
