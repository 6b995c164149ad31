# make serve | test | test-slow | test-hard | check | bench | soak: each installs what it needs into one virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Two workers side by side; the tests of a file share state, so a file stays with one worker.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
WORKERS ?= 2

.PHONY: serve test test-slow test-hard check bench soak clean
.DELETE_ON_ERROR:

# Serve the `lite` encoder, or another: make serve ENCODER=ViT-B-16/openai ARGS="--port 9000"
serve: $(VENV)/.serve
	$(BIN)/dmn serve $(if $(ENCODER),--encoder '$(ENCODER)') $(ARGS)

test: $(VENV)/.test
	$(PYTEST) -m "not slow" --timeout 60 $(ARGS)

# Real processes, servers and clusters, encoder exports, images, manifests; the laws of tests/property with more examples.
test-slow: $(VENV)/.slow
	$(PYTEST) -m slow --timeout 600 --hypothesis-profile laws-long $(ARGS)

# The default tier again, three times in a row; beside two busy loops, twice; while its processes are stopped and continued.
test-hard: $(VENV)/.slow
	$(BIN)/python scripts/test_under_load.py

check: $(VENV)/.check
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

# Long runs: workers that converge, processes that are killed, a cluster that loses nodes, memories that come and go,
# ten times the capacity asked for, instances restarted in turn, damaged requests, every promise of the OpenAPI document.
soak: $(VENV)/.slow
	$(BIN)/python -m pytest tests/soak --scale long --timeout 0 -s $(ARGS)

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "This needs Python 3.11 or newer; $(PYTHON) is older. Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[lite,embedded]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[lite,embedded,otel,test]'
	@touch $@ $(VENV)/.serve

$(VENV)/.slow: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --editable '.[lite,embedded,otel,cpu,test,slow]'
	@touch $@

$(VENV)/.check: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[lite,embedded,otel,cpu,test,lint]'
	@touch $@ $(VENV)/.serve $(VENV)/.test

$(VENV)/.bench: $(VENV)/.slow
	$(BIN)/python -m pip install --quiet --editable '.[lite,embedded,bench]'
	@touch $@
