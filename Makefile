# Everything happens in .venv; the first target that needs it makes it, later calls don't install again.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready
DATA ?= rendered
ARGS ?=
# Test files that run side by side.
JOBS ?= 2

.PHONY: help run art docs test test-slow test-gpu test-slurm test-browser test-wheel test-lowest wheel bench bench-scale lint format clean

help:
	@echo "make run                       the search engine on the embedded sample, from nothing"
	@echo "make run DATA=cifar10          the same on CIFAR-10: from \$$SIMSEARCH_DATA/cifar10 (data/cifar10 by"
	@echo "                               default), downloaded there where there is a network"
	@echo "make run ARGS='pooling=gem'    any override of simsearch train"
	@echo "make art                       an artwork recommender in the browser, of the embedded sample, step by step"
	@echo "make art DATA=<folder>         ... of your own paintings: artist/work.jpg, a flat folder, or a table"
	@echo "make docs                      the documentation as outputs/docs/index.html, to open without a server"
	@echo "make test                      the fast test suite;  make test-slow, make test-gpu: the others"
	@echo "make test-browser              the pages in a headless Chromium that is installed"
	@echo "make test-slurm                jobs on a SLURM of its own on this machine, taken down again (needs root)"
	@echo "make wheel                     dist/: the source distribution and the wheel;  make test-wheel: installs and tries it"
	@echo "make test-lowest               the same in an environment of the lowest versions that pyproject.toml allows"
	@echo "make bench                     speed beside the usual ways;  make lint, make format, make clean"
	@echo "make bench-scale               indexes of 10^5 vectors beside plain FAISS; ARGS='items=10000000 work=<folder>'"

# torch and torchvision come from the registry together and unpinned, as pyproject.toml says.
$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "simsearch needs Python 3.11, 3.12 or 3.13"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing packages into .venv (about 6 GB with torch, a few minutes)"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(READY)

run: $(READY)
	$(BIN)/simsearch train data=$(DATA) $(if $(filter cifar10,$(DATA)),data.download=true) $(ARGS)

art: $(READY)
	$(BIN)/simsearch art $(if $(filter-out rendered,$(DATA)),'$(DATA)') $(ARGS)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file docs/mkdocs.yml $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-slurm: $(READY)
	tests/slurm/with.sh $(BIN)/python -m pytest -m slurm $(ARGS)

test-browser: $(READY)
	$(BIN)/python -m pytest -m browser $(ARGS)

wheel: $(READY)
	$(BIN)/python -m build --outdir dist .

test-wheel: $(READY)
	tests/wheel.sh $(BIN)/python

# uv resolves lowest versions, which pip does not. torch brings its CUDA libraries: about 5 GB more.
test-lowest: $(READY)
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct '.[dev]'
	tests/wheel.sh .venv-lowest/bin/python

bench: $(READY)
	$(BIN)/python experiments/2026-11-23-bench/bench.py $(ARGS)

bench-scale: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python experiments/2026-11-28-index/scale.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-lowest build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
