# Each target does its own set-up; set-up on a ready machine takes a second.
#   make demo        imagine held-out real episodes, report in runs/demo
#   make test        lint, types, tests, wheel install
#   make test-vllm   the policy inside vLLM, in an environment of its own
#   make setup-sim   the ManiSkill simulator with its software renderer
#   make setup-libero  the LIBERO simulator and, from the hub, its scene assets
#   make gpu         GPU tests and benchmarks, one folder: runs/gpu
# PYTHON=python3.12 chooses the interpreter, VENV=folder the environment, ARGS=... goes to pytest.

VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
VLLM   ?= .venv-vllm
RUNS   ?= runs

.PHONY: setup setup-sim setup-libero setup-vllm demo test test-vllm lint typing gpu clean
.DEFAULT_GOAL := test

setup:
	@VENV=$(VENV) scripts/setup.sh

setup-sim: setup
	@VENV=$(VENV) scripts/setup_sim.sh

setup-libero: setup
	@VENV=$(VENV) scripts/setup_libero.sh

setup-vllm:
	@VENV_VLLM=$(VLLM) scripts/setup_vllm.sh

demo: setup
	$(BIN)/worldloop demo

test: setup lint
	$(BIN)/pytest $(ARGS)

test-vllm: setup-vllm
	HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 $(VLLM)/bin/pytest -m vllm tests/vllm $(ARGS)

lint: setup typing
	$(BIN)/ruff check .
	$(BIN)/mypy

# .typing/worldloop mirrors the installed layout for type checkers and editors.
typing:
	@scripts/typing_links.sh

gpu: setup
	@$(BIN)/python -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else \
	  'make gpu: torch %s sees no CUDA device; run this on a GPU machine' % torch.__version__)"
	@mkdir -p $(RUNS)/gpu
	@nvidia-smi > $(RUNS)/gpu/machine.txt 2>&1 || true
	@failed=""; $(BIN)/pytest -m gpu --junitxml=$(RUNS)/gpu/tests.xml || failed=" tests"; \
	run() { echo "bench $$*"; $(BIN)/worldloop bench "$$@" --out $(RUNS)/gpu || failed="$$failed $$1"; }; \
	run kernels; run policy; \
	run vae --batches 1 8 32; run vae --picture 480 640 --batches 1 4 16; \
	run train; run train --picture 480 640 --batch 1; \
	run rollout --reference-batches 1 8 --batches 1 8 32 64; \
	run rollout --picture 480 640 --no-gate-procedure --batches 1 4 16; \
	$(BIN)/worldloop bench report --results $(RUNS)/gpu --docs $(RUNS)/gpu || failed="$$failed report"; \
	if [ -n "$$failed" ]; then echo "make gpu: failed:$$failed"; exit 1; fi
	@echo "results: $(RUNS)/gpu"

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
