# illume-lightning. `make help` lists what can be run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Half of the pictures square, the others at four ratios of about the same area.
SIZES := [[224,224],[224,224],[224,224],[224,224],[160,224],[224,160],[160,320],[320,160]]
DATA := data
MARK := $(VENV)/.installed

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
demo: setup ## Prepare shapes and photographs, then train DualViTok through all its phases (about 15 minutes on 2 cores)
	$(BIN)/illume prepare shapes $(DATA)/shapes/train --count 6000 --sizes "$(SIZES)"
	$(BIN)/illume prepare shapes $(DATA)/shapes/val --split val --count 512 --sizes "$(SIZES)"
	$(BIN)/illume prepare photographs $(DATA)/photographs
	$(BIN)/illume fit -c experiments/shapes/vision_encoder.yaml
	$(BIN)/illume fit -c experiments/shapes/dualvitok.yaml

.PHONY: emoji
emoji: setup ## The same on Fluent Emoji 3D (fetched with npm)
	$(BIN)/illume prepare emoji $(DATA)/emoji .cache/emoji
	$(BIN)/illume fit -c experiments/emoji/vision_encoder.yaml
	$(BIN)/illume fit -c experiments/emoji/dualvitok.yaml

.PHONY: decoder
decoder: demo ## After the demo: train the diffusion decoder on its codes (about 20 minutes on 2 cores)
	$(BIN)/illume fit -c experiments/shapes/diffusion_decoder.yaml

SHAPES := $(DATA)/shapes
TEXT := $(SHAPES)/text_tokenizer
RATIOS := [[112,112],[112,112],[80,112],[112,80],[80,160],[160,80]]
CONVERSE = $(BIN)/illume prepare shapes-conversations --tokenizer $(TEXT)
CODES = $(BIN)/illume prepare tokens --tokenizer runs/shapes/dualvitok/seed0

.PHONY: conversations
conversations: setup ## Prepare the conversations about shapes, and the codes of the pictures they ask for
	$(BIN)/illume prepare shapes-tokenizer $(TEXT)
	for task in reconstruction captioning generation understanding editing text; do \
	  $(CONVERSE) --task $$task --count 6000 --sizes "[[160,160]]" $(SHAPES)/$$task/train && \
	  $(CONVERSE) --task $$task --count 256 --split val --sizes "[[160,160]]" $(SHAPES)/$$task/val || exit 1; \
	done
	for task in generation understanding editing; do \
	  $(CONVERSE) --task $$task --count 4000 --seed 1 --sizes "$(RATIOS)" $(SHAPES)/$$task/train-ratios && \
	  $(CONVERSE) --task $$task --count 256 --seed 1 --split val --sizes "$(RATIOS)" $(SHAPES)/$$task/val-ratios || exit 1; \
	done
	for task in reconstruction generation editing; do \
	  $(CODES) --side 112 $(SHAPES)/$$task/train $(SHAPES)/$$task/train-tokens-112 && \
	  $(CODES) --side 112 $(SHAPES)/$$task/val $(SHAPES)/$$task/val-tokens-112 || exit 1; \
	done
	for task in generation editing; do \
	  $(CODES) --side 160 $(SHAPES)/$$task/train $(SHAPES)/$$task/train-tokens-160 && \
	  $(CODES) --side 160 $(SHAPES)/$$task/val $(SHAPES)/$$task/val-tokens-160 && \
	  $(CODES) --side 112 --mode multi_ratio $(SHAPES)/$$task/train-ratios $(SHAPES)/$$task/train-ratios-tokens-112 && \
	  $(CODES) --side 112 --mode multi_ratio $(SHAPES)/$$task/val-ratios $(SHAPES)/$$task/val-ratios-tokens-112 || exit 1; \
	done

.PHONY: mllm
mllm: demo conversations ## After the demo: the MLLM's three stages on shapes (about 40 minutes on 2 cores)
	$(BIN)/illume fit -c experiments/shapes/mllm_stage1.yaml
	$(BIN)/illume fit -c experiments/shapes/mllm_stage2.yaml
	$(BIN)/illume fit -c experiments/shapes/mllm_stage3.yaml

EMOJI := $(DATA)/emoji
EMOJI_CODES = $(BIN)/illume prepare tokens --tokenizer runs/emoji/dualvitok/seed0

.PHONY: app
app: ## A page in the browser for the model of `make mllm`: chat, generate, edit, reconstruct
	$(BIN)/illume app runs/shapes/mllm_stage3/seed0 --tokenizer runs/shapes/dualvitok/seed0 --examples $(SHAPES)

.PHONY: emoji-mllm
emoji-mllm: emoji ## After emoji: its conversations, and the MLLM's three stages on them
	$(BIN)/illume prepare emoji-tokenizer $(EMOJI)/text_tokenizer .cache/emoji
	for task in reconstruction captioning generation understanding editing text; do \
	  $(BIN)/illume prepare emoji-conversations --tokenizer $(EMOJI)/text_tokenizer --task $$task $(EMOJI)/$$task .cache/emoji || exit 1; \
	done
	for task in reconstruction generation editing; do for split in train val; do \
	  $(EMOJI_CODES) --side 112 $(EMOJI)/$$task/$$split $(EMOJI)/$$task/$$split-tokens-112 || exit 1; \
	done; done
	for task in generation editing; do \
	  for split in train val; do \
	    $(EMOJI_CODES) --side 160 $(EMOJI)/$$task/$$split $(EMOJI)/$$task/$$split-tokens-160 && \
	    $(EMOJI_CODES) --side 112 --mode multi_ratio $(EMOJI)/$$task/$$split $(EMOJI)/$$task/$$split-tokens-112-ratios || exit 1; \
	  done; \
	done
	$(BIN)/illume fit -c experiments/emoji/mllm_stage1.yaml
	$(BIN)/illume fit -c experiments/emoji/mllm_stage2.yaml
	$(BIN)/illume fit -c experiments/emoji/mllm_stage3.yaml

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

.PHONY: benchmark
benchmark: setup ## Measure quantiser, training step, loader, decoder and loss; results go to benchmarks/results
	$(BIN)/python benchmarks/simvq.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/decoder.py
	$(BIN)/python benchmarks/linear_cross_entropy.py
	# Needs the conversations of `make conversations`.
	$(BIN)/python benchmarks/mllm_step.py

.PHONY: benchmark-generation
benchmark-generation: setup ## Measure the generation engine against Hugging Face's generate (about 10 minutes on 2 cores)
	$(BIN)/python benchmarks/generation.py

.PHONY: clean
clean: ## Remove the virtual environment and caches; data and runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
