# make serve | test | check | bench | soak: each makes its virtual environment and installs what it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: serve test check bench soak clean
.DELETE_ON_ERROR:

# Serve the `lite` encoder, or another: make serve ENCODER=ViT-B-16/openai ARGS="--port 9000"
serve: $(VENV)/.serve
	$(BIN)/dmn serve $(if $(ENCODER),--encoder '$(ENCODER)') $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/audit.py

bench: $(VENV)/.bench
	$(BIN)/dmn bench readout
	$(BIN)/dmn bench readout --shots 16 --batch 32
	$(BIN)/dmn bench scaling
	$(BIN)/dmn bench store
	$(BIN)/python tests/bench/bench_resident.py
	$(BIN)/python -m tests.bench.bench_serving
	$(BIN)/python -m tests.bench.bench_processes
	$(BIN)/python -m tests.bench.bench_encoder

# Long runs: workers that converge, processes that are killed, a cluster that loses nodes, one whose memories come and
# go, one that is asked ten times what it can do, instances that are restarted in turn, one that is sent what no client
# sends, and one that is asked for all that its document promises.
soak: $(VENV)/.dev
	$(BIN)/python tests/soak/convergence.py
	$(BIN)/python tests/soak/kills.py
	$(BIN)/python tests/soak/cluster.py
	$(BIN)/python -m tests.soak.memory
	$(BIN)/python -m tests.soak.overload
	$(BIN)/python -m tests.soak.rolling
	$(BIN)/python -m tests.soak.rolling --instances 3 --cluster
	$(BIN)/python -m tests.soak.mutations
	$(BIN)/python -m tests.soak.contract

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "This needs Python 3.11 or newer; $(PYTHON) is older. Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[lite,embedded]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[lite,embedded,cpu,otel,dev]'
	@touch $@ $(VENV)/.serve

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[lite,embedded,bench]'
	@touch $@
