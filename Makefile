# Two commands on a fresh machine: `make demo` and `make test`. Each installs what it needs first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo docs fuzz gpu kill slow test lint sanitize wheel format clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch .venv/installed

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed
	$(BIN)/python -m pytest

# More families and sizes of what a quicker test covers.
slow: .venv/installed
	$(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/docs-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch .venv/docs-installed

# The documentation, into site/; a warning is an error, and nothing is fetched.
docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A manylinux wheel with compiled CPU kernels, into dist/: whoever installs it needs no compiler.
.venv/wheel-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[wheel]"
	touch .venv/wheel-installed

wheel: .venv/wheel-installed
	rm -rf build/wheel
	KBITC_PREBUILD=1 $(BIN)/python -m build --wheel --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libtorch_cpu.so --wheel-dir dist build/wheel/*.whl

# The kernel tests with address and undefined-behaviour checks compiled into the kernels.
sanitize: .venv/installed
	KBITC_SANITIZE=address,undefined LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 KBITC_FUZZ=200 $(BIN)/python -m pytest tests/kernels -n 0

# Mutated files of every kind through the command line and the Python interface; a table, and failing files.
# The same command goes on where an interrupted one stopped; another SEED gives other mutants.
SEED ?= 0
fuzz: .venv/installed
	$(BIN)/python -m benchmarks.fuzz --mutants 10000 --seconds 1800 --seed $(SEED) --log build/fuzz-$(SEED).jsonl --failures build/fuzz-failures

# Correctness of the Triton kernels on the device that is there.
gpu: .venv/installed
	$(BIN)/python -m pytest tests/kernels/gpu -m gpu -n 0
	$(BIN)/python -m benchmarks.gpu_linear --markdown benchmarks/results/$$(date -I)-gpu-linear.md
	$(BIN)/python -m benchmarks.gpu_decode --markdown benchmarks/results/$$(date -I)-gpu-decode.md

# Random kills of compile, --force, --resume and export: half an hour, a table.
kill: .venv/installed
	$(BIN)/python -m benchmarks.kill --kills 200 --seconds 1800 --signals

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build site dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
