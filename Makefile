# Everything a newcomer needs; each target makes .venv and installs first where that has not happened yet.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.installed

.PHONY: demo demo-short test lint bench clean

demo: $(READY)
	$(BIN)/python -m aligndet demo --out runs/demo

demo-short: $(READY)
	$(BIN)/python -m aligndet demo --short --check --out runs/demo-short

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/contrastive.py
	$(BIN)/python benchmarks/step.py

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-cache-dir --quiet --upgrade pip
	$(BIN)/python -m pip install --no-cache-dir --quiet --editable ".[plots,dev]"
	touch $@

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
