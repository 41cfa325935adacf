# Every target does its own set-up: in a fresh clone `make serve` or `make test` is the first and only command.
#
#   PYTHON=python3.12   the interpreter to build the environment with (3.11, 3.12 or 3.13)
#   ARGS="..."          passed on to the command that the target runs

VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PYTHON ?=
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
UV_VERSION := 0.13.9
# For `make gpu-evidence`: an interpreter that has torch's CUDA build. By default that is the environment's own where it
# has one; else a second environment is made, of 5 GB.
CUDA_PY ?=
TRITON_VERSION := 3.7.1# what torch 2.13.0 pins
CUDA_VENV ?= build/cuda
CHECKOV_VERSION := 3.3.30
CHECKOV := build/checkov
RAY_VENV ?= build/ray# for Ray Serve, whose packages weigh more than the server's

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-slow browser check measures format bench bench-online bench-kernels gpu-check conformance faults soak serve-ray ray-check dashboards lock clean doctor gpu-evidence checkov

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(DEV) ## Create .venv and install the locked dependencies, development tools included

serve: $(RUNTIME) ## Serve the bundled models on 127.0.0.1:8000 (other models: ARGS="--model ... --reward-model ...")
	$(PY) -m server $(ARGS)

# Two processes of one thread each: the tests' tensors are tiny, and threads that wait for each other on busy cores cost
# ten times the work. A file is run by one process, so that what its tests share is made once.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest

test: $(DEV) ## Run the test suite, all but what takes long
	$(PYTEST) -n 2 --dist loadfile -m "not slow" $(ARGS)

test-slow: $(DEV) ## Run the tests that take long: compilers, interpreters, thousands of generated cases
	$(PYTEST) -n 2 -m slow $(ARGS)

browser: $(DEV) ## Get Chromium for the slow tests of the playground, where the machine has none
	@command -v chromium chromium-browser google-chrome >/dev/null || $(VENV)/bin/playwright install chromium

checkov: $(CHECKOV)/bin/checkov ## Get the linter of the Kubernetes manifests, in an environment of its own, for test-slow

$(CHECKOV)/bin/checkov: | $(PY)
	@$(PY) -m venv $(CHECKOV)
	@$(CHECKOV)/bin/pip install --quiet --disable-pip-version-check checkov==$(CHECKOV_VERSION)

check: $(DEV) ## Lint, formatting, types, who may import whom, and how heavy the house may be
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) -m benchmarks.measures --check

measures: $(DEV) ## How heavy the house is: lines, settings, frames of a guided step (ARGS=--check holds the bounds)
	$(PY) -m benchmarks.measures $(ARGS)

format: $(DEV) ## Format the code and fix what ruff can fix
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench: $(DEV) ## Measure the engine offline: tokens/s against the plain loop, and the share of the GEMM rate
	$(PY) -m benchmarks.offline $(ARGS)

bench-online: $(DEV) ## Measure a server over HTTP: throughput, latencies by arrival rate, and what HTTP adds to a step
	$(PY) -m benchmarks.online $(ARGS)
	$(PY) -m benchmarks.plots build/bench/online.json

bench-kernels: $(DEV) ## Measure the kernels against the research code's operations
	$(PY) -m benchmarks.kernels $(ARGS)

doctor: $(RUNTIME) ## Whether this machine can serve, and what is in the way (ARGS="--model ..." as for serve)
	$(PY) -m server doctor $(ARGS)

# With PY=python3 any interpreter that has torch will do, and nothing is installed.
gpu-check: $(if $(filter file,$(origin PY)),$(DEV)) ## On a GPU: is everything right there, and how fast? (ARGS="--minutes 8": what matters most)
	$(PY) -m benchmarks.gpu.check $(ARGS)

gpu-evidence: $(DEV) ## Without a GPU: what is known of the GPU path; launches are counted, kernels compiled
	@python=$(CUDA_PY); \
	if [ -z "$$python" ] && $(PY) -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then python=$(PY); fi; \
	if [ -z "$$python" ]; then $(MAKE) --no-print-directory $(CUDA_VENV)/.installed; python=$(CUDA_VENV)/bin/python; fi; \
	"$$python" -m benchmarks.gpu.evidence $(ARGS)

conformance: $(RUNTIME) ## Real clients against a real server, and the published code's recorded runs (ARGS="openai litellm": only those)
	$(PY) -m tests.conformance $(ARGS)

# Each is a program with options of its own; all others are the server's: make faults FAULTS=kill_worker
# ARGS="--kills 5 --data-parallel 2"
FAULTS ?= overload disconnects slow fuzz kill_worker kill_server kill_faults scorers

faults: $(DEV) ## Overload, abuse, kill and break the server and its workers (FAULTS=... chooses, ARGS=... are its options)
	@failed=0; for program in $(FAULTS); do \
	  echo "== $$program"; $(PY) -m tests.faults.$$program $(ARGS) || failed=1; \
	done; exit $$failed

soak: $(DEV) ## Half an hour of everything at once: no leak, no answer lost (ARGS="--minutes 5": shorter)
	$(PY) -m tests.faults.soak $(ARGS)

serve-ray: $(RAY_VENV)/.installed ## Serve the bundled models on Ray Serve (ENTRGI_DEVICE=cpu or a GPU; deploy/ray/serve.yaml)
	PYTHONPATH=. RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 $(RAY_VENV)/bin/serve run deploy/ray/serve.yaml

ray-check: $(RAY_VENV)/.installed ## Kill, scale and replace replicas of Ray Serve under load; what Ray adds (ARGS="--minutes 1": shorter)
	$(RAY_VENV)/bin/python -m tests.faults.ray_serve $(ARGS)

dashboards: $(RUNTIME) ## Ask a real Prometheus, under load, every expression of the dashboard and the alerts
	$(PY) -m tests.conformance.dashboard $(ARGS)

lock: $(DEV) ## Resolve pyproject.toml anew into the lock files
	$(PIP) uv==$(UV_VERSION)
	$(VENV)/bin/uv pip compile --quiet --upgrade pyproject.toml -o requirements.lock
	$(VENV)/bin/uv pip compile --quiet --upgrade pyproject.toml --extra otel -c requirements.lock -o requirements-otel.lock
	$(VENV)/bin/uv pip compile --quiet --upgrade pyproject.toml --extra eval -c requirements.lock -o requirements-eval.lock
	$(VENV)/bin/uv pip compile --quiet --upgrade pyproject.toml --extra otel --extra ray -c requirements.lock -o requirements-ray.lock
	$(VENV)/bin/uv pip compile --quiet --upgrade pyproject.toml --group dev -c requirements.lock -o requirements-dev.lock
	for pins in tests/conformance/*/requirements.in; do $(VENV)/bin/uv pip compile --quiet --upgrade $$pins -o $${pins%.in}.txt; done

$(RAY_VENV)/.installed: requirements-ray.lock | $(PY)
	@echo "installing requirements-ray.lock into $(RAY_VENV)"
	@$(PY) -m venv $(RAY_VENV)
	@$(RAY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-ray.lock
	@touch $@

# pip may be told of a folder or an index with torch's CPU build, which it would take: only its main index counts here.
$(CUDA_VENV)/.installed: requirements.lock | $(PY)
	@echo "installing requirements.lock with torch's CUDA build into $(CUDA_VENV)"
	@$(PY) -m venv $(CUDA_VENV)
	@index=$$($(PY) -m pip config get global.index-url 2>/dev/null); \
	PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= PIP_EXTRA_INDEX_URL= $${index:+PIP_INDEX_URL="$$index"} \
	  $(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

clean: ## Remove the environment, caches and build outputs
	rm -rf $(VENV) build .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if "$$candidate" -c '$(SUPPORTED)' 2>/dev/null; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "error: no Python 3.11, 3.12 or 3.13 found; name one with PYTHON=..." >&2; exit 1; fi; \
	echo "creating $(VENV) with $$found ($$("$$found" --version))"; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); echo "error: the venv module is missing (Debian: python3-venv)" >&2; exit 1; }

$(RUNTIME): requirements.lock | $(PY)
	@echo "installing requirements.lock"
	@$(PIP) -r requirements.lock
	@touch $@

# triton comes with CUDA builds of torch. Beside a CPU build the kernel tests run the same one in its interpreter.
$(DEV): requirements-dev.lock | $(PY)
	@echo "installing requirements-dev.lock"
	@$(PIP) -r requirements-dev.lock
	@[ "$$(uname -s)" != Linux ] || $(PY) -c 'import sys, torch; sys.exit(torch.version.cuda is None)' \
	  || $(PIP) triton==$(TRITON_VERSION)
	@touch $@ $(RUNTIME)
