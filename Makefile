# Two commands matter on a fresh machine: `make train` and `make test`. Everything runs inside .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/disks.yaml
ARGS ?=

.PHONY: install train test bench lint docs cuda cuda-emulated recovery methods pretrained claims cluster clean

$(BIN)/.installed: pyproject.toml setup.py $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

install: $(BIN)/.installed

# Continues a run that was interrupted; ends with the path of the report.
train: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed -q sami_fast/train.py --config $(CONFIG) --resume $(ARGS)

test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# Speed against every rival that is installed: a table, runs/bench/rows.jsonl and rows.csv.
bench: install
	mkdir -p runs/bench
	$(BIN)/python -m pytest benchmarks --rows runs/bench/rows.jsonl --rows runs/bench/rows.csv $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --summary=none --error-stale-baseline

# The documentation site, into build/site; nothing is fetched, and a warning is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Every CUDA kernel for every chip, without spills on sm_90; needs nvcc, no GPU.
cuda: install
	$(BIN)/python csrc/check_cuda.py $(ARGS)

# Every CUDA kernel in an emulator on the CPU, and planted faults that it has to find; a part of `make test`, too.
cuda-emulated: install
	$(BIN)/python -m pytest -n auto --dist worksteal tests/test_emulator.py tests/test_core_*.py tests/test_ops.py -k "emulator or cuda" $(ARGS)

# Ten seeds of the disks run, one per core at a time: writes docs/results.md. About half an hour on two cores.
recovery: install
	$(BIN)/python -m benchmarks.recovery $(ARGS)

# SAMI, a beta-VAE and a diffusion autoencoder on disks and sprites, three seeds each: writes docs/results.md. About two hours on two cores.
methods: install
	$(BIN)/python -m benchmarks.methods $(ARGS)

# Encoders on a pretrained diffusers UNet against the joint run, five seeds: writes docs/results.md. About fifteen minutes.
pretrained: install
	$(BIN)/python -m benchmarks.pretrained $(ARGS)

# Everything that docs/results.md claims of learning, trained and judged: many hours on two cores; ARGS="--only rooms" is a part of it.
claims: install
	$(BIN)/python -m benchmarks.claims $(ARGS)

# Hosts in namespaces of this machine, by hostfile and by Slurm, and all that may happen to them: Linux and root, and the Debian packages
# openssh-server, pdsh, slurm-wlm, munge; skipped with the reason elsewhere. A quarter of an hour; ARGS="-k hostfile" is a part of it.
cluster: install
	$(BIN)/python -m pytest -s tests/cluster $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info sami_fast/*.so .pytest_cache .ruff_cache
