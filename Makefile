# Every verb sets itself up: a virtual environment in .venv with the package and its tools.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all check bench setup clean

setup: $(READY)

# torch first and by its exact version: anything looser may pull a much larger build.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard src/moefit/formats/csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tensorboard]'
	@touch $@

demo: $(READY)  ## train a small DS-MoE for a minute, then measure and serve the shipped one
	$(BIN)/moefit demo

# One thread a worker: two workers share two cores, and tiny tensors gain nothing from more.
test test-all: export OMP_NUM_THREADS = 1

test: $(READY)  ## everything that runs in a few minutes on two cores
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-all: $(READY)  ## the slow ones too
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not gpu and not download"

check: $(READY)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)  ## the two benchmarks that need no training
	cd benchmarks && ../$(BIN)/python training_cost.py --save
	cd benchmarks && ../$(BIN)/python sparse_inference.py --save

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis
