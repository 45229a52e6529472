# Everything runs in .venv, which the first target that needs it makes. PYTHON is the interpreter that .venv is made from.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet -c constraints.txt
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h')
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: build test demo bench lint format wheel clean

# An editable install: Python files are used where they are, the libraries are rebuilt when csrc changes.
build: .venv/built

test: build
	$(PY) -u tests/run.py

demo: build .venv/demo
	$(PY) -u -m peftops demo

bench: build
	$(PY) -u bench/lora.py
	$(PY) -u bench/report.py

lint: .venv/lint
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)

format: .venv/lint
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

wheel: build
	$(PY) -m pip wheel --quiet . --no-deps --no-build-isolation --wheel-dir dist
	@ls dist/*.whl

clean:
	rm -rf .venv build dist python/peftops/lib python/peftops/_C*.so python/*.egg-info

.venv/created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"peftops needs Python >= 3.10: make PYTHON=...; $(PYTHON) is {sys.version}")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/requirements: .venv/created constraints.txt pyproject.toml
	$(PIP) torch setuptools pybind11 cmake ninja
	touch $@

.venv/built: .venv/requirements $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[test,bench]'
	touch $@

.venv/lint: .venv/created constraints.txt
	$(PIP) ruff clang-format
	touch $@

.venv/demo: .venv/requirements requirements-demo.txt
	$(PY) -m pip install --quiet --no-deps --require-hashes -r requirements-demo.txt
	touch $@
