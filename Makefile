# illume-lightning. `make help` lists what can be run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MARK := $(VENV)/.installed
# In an environment of its own: it brings packages that were not tested with ours.
AUDIT := pip-audit==2.10.1

.DEFAULT_GOAL := help

.PHONY: help
help: ## List these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(MARK): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(MARK)

.PHONY: setup
setup: $(MARK) ## Make the virtual environment with the tested versions

.PHONY: demo
demo: setup ## The whole schedule on shapes, from nothing to a report (about 30 minutes on 2 cores)
	$(BIN)/illume schedule experiments/shapes/schedule.yaml

.PHONY: emoji
emoji: setup ## The same on Fluent Emoji 3D, fetched with npm (a night on 2 cores)
	$(BIN)/illume schedule experiments/emoji/schedule.yaml

.PHONY: app
app: ## A page in the browser for the model of `make demo`: chat, generate, edit, reconstruct
	$(BIN)/illume app runs/shapes/mllm_stage3/seed0 --tokenizer runs/shapes/dualvitok/seed0 \
	  --diffusion_decoder runs/shapes/diffusion_decoder/seed0 --examples data/shapes/conversations

.PHONY: test
test: setup ## Run the tests (under 12 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: test-slow
test-slow: setup ## Run the tests that take minutes each
	$(BIN)/python -m pytest -m slow

.PHONY: check
check: setup ## Lint, format check and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: audit
audit: ## Look the tested versions up among known vulnerabilities (needs the network; what can't be looked up is said)
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check '$(AUDIT)'
	rm -f .venv-audit/report.json
	-.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off \
	  --format json --output .venv-audit/report.json
	.venv-audit/bin/python .ci/audit.py .venv-audit/report.json

.PHONY: benchmark
benchmark: setup ## Measure quantiser, training step, loader, decoder and loss; results go to benchmarks/results
	$(BIN)/python benchmarks/simvq.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/decoder.py
	$(BIN)/python benchmarks/linear_cross_entropy.py
	# Needs the conversations of `make demo`.
	$(BIN)/python benchmarks/mllm_step.py

.PHONY: figures
figures: setup ## Write the measured figures of README and docs from benchmarks/results
	$(BIN)/python benchmarks/figures.py

.PHONY: benchmark-generation
benchmark-generation: setup ## Measure the generation engine against Hugging Face's generate (about 10 minutes on 2 cores)
	$(BIN)/python benchmarks/generation.py

.PHONY: benchmark-gpu
benchmark-gpu: setup ## Measure training, options for speed and generation on an NVIDIA GPU (under 8 minutes)
	$(BIN)/python benchmarks/gpu.py

.PHONY: benchmark-training
benchmark-training: setup ## Measure the modules against bare loops, and two processes against one (about 15 minutes)
	$(BIN)/python benchmarks/modules.py
	$(BIN)/python benchmarks/ddp.py

.PHONY: clean
clean: ## Remove the virtual environment and caches; data and runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
