# make demo | make test | make test-slow | make test-slurm | make check | make bench: each installs into .venv by itself the
# first time.
# Another Python: make PYTHON=python3.12 demo. Other indexes or wheels for pip: make PIP_ARGS="..." demo.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# What the demo's stages are run with: for example make demo STORE_ARGS="corpus.num_tokens=60000" OUTPUTS=outputs/small
OUTPUTS ?= outputs/demo
STORE_ARGS ?=
TRAIN_ARGS ?=
PAIRS := base_simpo base_dpo simpo_dpo

.PHONY: demo test test-slow test-slurm check bench
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python -m demo outputs=$(OUTPUTS)
	$(BIN)/python -m extract.tokens experiment=demo outputs=$(OUTPUTS) $(STORE_ARGS)
	$(BIN)/python -m extract.activations experiment=demo outputs=$(OUTPUTS) $(STORE_ARGS)
	set -e; for pair in $(PAIRS); do \
	  $(BIN)/python -m train experiment=demo/$$pair outputs=$(OUTPUTS) $(STORE_ARGS) $(TRAIN_ARGS); done
	$(BIN)/python -m analysis experiment=demo outputs=$(OUTPUTS) $(STORE_ARGS) $(TRAIN_ARGS)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not slow" -rs -n 2 --dist loadfile

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m slow

# The cluster scripts on a real Slurm that the tests bring up: as root, with the packages that .ci/run installs.
test-slurm: $(INSTALLED)
	CROSSDIFF_REQUIRE_SLURM=1 $(BIN)/python -m pytest tests/slurm

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The first line needs nothing, the others measure on what `make demo` left.
bench: $(INSTALLED)
	set -e; for name in step select writing engines annotate claims report shared_reader; do $(BIN)/python -m benchmarks.bench_$$name; done
	$(BIN)/python -m benchmarks.bench_extract experiment=demo outputs=$(OUTPUTS)
	set -e; for name in codecs loader quality public analysis; do \
	  $(BIN)/python -m benchmarks.bench_$$name experiment=demo/base_simpo outputs=$(OUTPUTS); done

$(INSTALLED): setup.cfg pyproject.toml constraints.txt demo/requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt -e '.[dev,deepspeed,slurm,sweep,dashboard,app]'
	$(BIN)/pip install -q $(PIP_ARGS) --no-deps -r demo/requirements.txt
	touch $@
