# Two commands set everything up: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
# The interpreter that creates $(VENV): the first here that runs and is new enough. Give your own with PYTHON=….
PYTHON ?= $(eval PYTHON := $(FIND_PYTHON))$(PYTHON)
FIND_PYTHON = $(shell for p in python3.14 python3.13 python3.12 python3.11 python3; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
# Always asked for by exactly this requirement, in the same command as all else, so that pip never picks another build.
TORCH ?= torch==2.13.0
GPU_PYTHON ?= $(VENV)/bin/python
JOBS ?= 2
YEARS ?= 10
# The tests run one process a core: BLAS threads of their own would only fight over the cores.
export OPENBLAS_NUM_THREADS ?= 1

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
CHECKOUT := -e '.[build,serve,remote]'
# Empty where no GPU is listed.
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -m1 '^GPU')

define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit(f"cubinery: {sys.executable} is Python {sys.version.split()[0]}; 3.11 or newer is needed: make PYTHON=…")
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit(f"cubinery: {sys.executable} has no {error.name} (Debian and Ubuntu: apt install python3-venv)")
endef
export CHECK_PYTHON

.PHONY: help demo test test-all ahead soak lint format build serve gpu-verify bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo ## set up, then build, serve, prefetch and (with a GPU) run a small set of kernels
	$(VENV)/bin/python docs/demo.py

test: lint ## set up, then lint and run every test that needs no GPU; kernels that were executed before are sampled
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup --ignore tests/gpu

test-all: lint ## the same, but execute every kernel, whatever was executed before, and record it in tests/kernels/executed.jsonl
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup --ignore tests/gpu --executed all

# Kernels know no clock and take long; images are installed from servers whose certificates end.
ahead: $(VENV)/.test ## run the tests that may know the day with the clock YEARS=10 ahead; needs a C compiler
	$(CC) -shared -fPIC -O1 -DAHEAD='$(YEARS) * 31557600LL' -o $(VENV)/ahead.so tests/ahead.c
	LD_PRELOAD=$(abspath $(VENV))/ahead.so $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup \
	    $(addprefix --ignore tests/,gpu kernels ptx project/test_images.py)

soak: $(VENV)/.test ## run the bars of trust at their full size, some 20 minutes, into benchmarks/results/soak.json
	$(VENV)/bin/python -m tests.soak --full --out benchmarks/results/soak.json

lint: $(VENV)/.test ## ruff, mypy and import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.test ## rewrite the sources in ruff's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

build: $(VENV)/.demo ## compile every variant for sm_120 into the default registry
	$(VENV)/bin/python -m builder --arch sm_120

serve: $(VENV)/.demo ## serve the default registry on 127.0.0.1:8000
	$(VENV)/bin/python -m server --host 127.0.0.1 --port 8000

# These two use GPU_PYTHON, which has torch for this machine's GPU, and the registry file that CUBINERY_REGISTRY names.
gpu-verify: ## re-prove every variant on this GPU into tests/gpu/ledger; needs PLANTED=planted.db, see docs/operations.md
	$(GPU_PYTHON) -m tests.gpu.verify $(if $(PLANTED),--planted $(PLANTED))

bench: ## measure on this machine's GPU, into benchmarks/results
	$(GPU_PYTHON) -m benchmarks

clean: ## remove the environment, caches and build outputs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "cubinery: no $(PYTHON) here; name a Python 3.11 or newer: make PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet 'pip>=25.1' # the first that installs dependency groups
	touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml
	$(PIP) install --quiet $(CHECKOUT) $(if $(GPU),'$(TORCH)')
	touch $@

$(VENV)/.test: $(VENV)/.created pyproject.toml
	$(PIP) install --quiet $(CHECKOUT) --group test '$(TORCH)'
	touch $@ $(VENV)/.demo
