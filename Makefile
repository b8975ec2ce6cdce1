# Two commands matter on a fresh machine: `make train` and `make test`. Everything runs inside .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/disks.yaml
ARGS ?=

.PHONY: install train test bench lint recovery clean

$(BIN)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

install: $(BIN)/.installed

# Continues a run that was interrupted; ends with the path of the report.
train: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --log_level warning sami_fast/train.py --config $(CONFIG) --resume $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

bench: install
	$(BIN)/python -m pytest benchmarks $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Eight seeds of the disks run, one per core at a time: writes docs/results.md. About half an hour on two cores.
recovery: install
	$(BIN)/python benchmarks/recovery.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
