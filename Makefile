# What a newcomer needs: `make demo` and `make test`. Each sets up .venv by itself; the second time it is quick.

PYTHON ?= python3
ROUNDS ?= 200
RESETS ?= 100
RELOADS ?= 30
SECONDS ?= 60
COVERAGE ?= 0
VENV := .venv
BIN := $(VENV)/bin
TOGETHER := -n 4 --dist loadfile --no-loadscope-reorder --durations=15
COUNTS := $(filter-out 0,$(COVERAGE))
COUNTED := $(if $(COUNTS),coverage run,python)
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.ready-demo

.DEFAULT_GOAL := help
.PHONY: help demo test all-tests uncompiled test-long check format bench chaos simulate cluster-chaos clean

# A hundred processes that tests start would compile all sources again where this is set.
unexport PYTHONDONTWRITEBYTECODE

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO_READY)  ## Stream recorded speech and verify every output; KEEP=1 keeps streaming, for the dashboard
	$(BIN)/instep demo $(if $(filter-out 0,$(KEEP)),--keep)

test: $(READY)  ## Run the checks and all tests but long ones; COVERAGE=1 also counts the lines that they run
	$(if $(COUNTS),$(BIN)/coverage erase)
	@$(MAKE) --no-print-directory -j 2 all-tests check $(if $(COUNTS),uncompiled)
	$(if $(COUNTS),$(BIN)/coverage combine --quiet)
	$(if $(COUNTS),$(BIN)/coverage report --skip-covered --fail-under=95)

all-tests: $(READY)
	$(BIN)/$(COUNTED) -m pytest $(TOGETHER)

uncompiled: check  # since the lines of compiled kernels cannot be counted
	NUMBA_DISABLE_JIT=1 $(BIN)/$(COUNTED) -m pytest -q tests/core

test-long: $(READY)  ## Run the tests that take over 5 s: mutants, chaos, a million damaged messages, scale
	$(BIN)/python -m pytest -m long $(TOGETHER)

check: $(READY)  ## Check format, style, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## Format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## Measure the cost of serving; MODEL=FOLDER measures your model
	$(BIN)/python -m benchmarks $(if $(MODEL),--model '$(MODEL)')

chaos: $(READY)  ## Kill the server and break connections under load; compare outputs
	$(BIN)/python -m tests.chaos --kills $(ROUNDS)
	$(BIN)/python -m tests.chaos --resets $(RESETS)
	$(BIN)/python -m tests.chaos --reloads $(RELOADS)

simulate: $(READY)  ## Put clusters of shards through random faults in virtual time; SECONDS=600 takes longer
	$(BIN)/python -m tests.cluster.simulation --seconds $(SECONDS)

cluster-chaos: ROUNDS = 50
cluster-chaos: SEED = 1
cluster-chaos: $(READY)  ## Kill, freeze and move the nodes of a cluster under load; compare outputs, show interruptions; ON=ray has Ray run it
	$(BIN)/python -m tests.cluster --rounds $(ROUNDS) --seed $(SEED) --on '$(ON)'

clean:  ## Remove .venv and everything made by the targets above
	rm -rf $(VENV) demo-out examples-out test-artefacts build dist .coverage .coverage.* .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find benchmarks clients engine examples tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): $(DEMO_READY)
	@echo "Adding to $(VENV) what checks and tests need: once, a minute or two and about 0.9 GB of disk."
	$(BIN)/pip install --disable-pip-version-check -e ".[dev]"
	-$(BIN)/pip install --disable-pip-version-check --no-deps BeatNet==1.1.3 pyannote.audio==4.0.7  # see examples/README.md
	@touch $@

$(DEMO_READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON); install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "instep needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -c 'import platform; print(platform.python_version())'); name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV): once, a minute or two and about 1.2 GB of disk (more where pip chooses PyTorch with CUDA)."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -e ".[engine]"
	@touch $@
