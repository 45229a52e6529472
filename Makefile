# Everything runs in .venv, which the first target that needs it makes. PYTHON is the interpreter that .venv is made from.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet -c constraints.txt
SOURCES := $(shell find csrc cmake -type f -not -name '*.pyc') CMakeLists.txt setup.py pyproject.toml
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
GPU_PY := $(if $(wildcard $(PY)),$(PY),python3)
GPU := $(wildcard /dev/nvidia0 /dev/dxg)
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: build test kernels abi demo bench gpu-libs gpu-check gpu-sanitize gpu-bench lint format wheel clean

# An editable install: Python files are used where they are, the libraries are rebuilt when csrc changes. The CUDA library is built where
# nvcc is found, or as PEFTOPS_CUDA=1 or 0 says.
build: .venv/built

test: build
	$(PY) -u tests/run.py

# What the compiler made of each CUDA kernel, against the record in tests/build/kernels.txt; RECORD=1 writes the record anew.
kernels: build
	$(PY) tests/build/kernels.py $(if $(RECORD),--record)

# The wheel under other releases of torch, each [@PYTHON] in an environment of its own in build/abi; downloads several GB.
ABI ?= 2.10.0 newest
abi: build
	$(PY) -u tests/build/abi/run.py $(ABI)

# Without a GPU the CPU library is enough.
demo: $(if $(GPU),.venv/built,.venv/built-cpu) .venv/demo
	$(PY) -u -m peftops demo

bench: build
	$(PY) -u bench/lora.py
	$(PY) -u bench/hf_peft.py
	$(PY) -u bench/report.py

# What only a GPU can show, each in under nine minutes (CONTRIBUTING.md, "On a GPU"). A GPU machine has the libraries from the archive of
# gpu-libs and needs neither .venv nor a build. ARGS adds options.
gpu-libs: build
	$(PY) -m tests.gpu.pack

gpu-check:
	PYTHONPATH=python $(GPU_PY) -u -m tests.gpu.check $(ARGS)

gpu-sanitize:
	PYTHONPATH=python $(GPU_PY) -u -m tests.gpu.sanitize $(ARGS)

gpu-bench:
	PYTHONPATH=python $(GPU_PY) -u bench/lora.py --device cuda $(ARGS)

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

# CUTLASS for its headers, so without the Python packages that it requires, which is no conflict to warn about; cuobjdump and nvdisasm for
# the reports on machine code.
.venv/built: .venv/requirements $(SOURCES)
	nvcc=$$($(PY) cmake/cuda_toolkit.py) && if [ -n "$$nvcc" ]; then \
	  $(PIP) --no-deps nvidia-cutlass nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm; fi
	$(PIP) --no-warn-conflicts --no-build-isolation --editable '.[test,bench]'
	touch $@

.venv/built-cpu: .venv/requirements $(SOURCES)
	$(MAKE) --question .venv/built || PEFTOPS_CUDA=0 $(PIP) --no-warn-conflicts --no-build-isolation --editable '.[test,bench]'
	touch $@

.venv/lint: .venv/created constraints.txt
	$(PIP) ruff clang-format
	touch $@

.venv/demo: .venv/requirements requirements-demo.txt
	$(PY) -m pip install --quiet --no-deps --require-hashes -r requirements-demo.txt
	touch $@
