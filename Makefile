# make setup     .venv with everything that the demo and the tests need
# make demo      export SmolLM2-135M, calibrate its exits, run it and show what was saved
# make test      lint, types aside: the tests (under 12 minutes on 2 cores)
# make test-full the slow proofs as well, and TensorRT-RTX
# make test-gpu  what needs an NVIDIA GPU, and the file to send back
# make lint      ruff, formatter, mypy

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := build/demo
PIP := $(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt
TORCH := $(shell sed -n 's/^torch//p' constraints-cpu.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: setup demo test test-full test-gpu lint format clean

setup: $(STAMP)

# PyPI's torch for Linux brings gigabytes of CUDA: the build without it is taken where there is one
# (configured indexes, then PyTorch's; macOS has no other than PyPI's).
$(STAMP): pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) 'torch$(TORCH)+cpu' 2>/dev/null \
		|| $(PIP) 'torch$(TORCH)+cpu' --index-url $(CPU_INDEX) 2>/dev/null \
		|| $(PIP) torch
	$(PIP) --editable '.[cpu,export,gguf,dev]'
	touch $(STAMP)

demo: setup
	test -f $(DEMO)/manifest.json || $(BIN)/adainfer-export smollm2-135m --out $(DEMO)
	$(BIN)/adainfer inspect $(DEMO)
	$(BIN)/python tools/demo.py $(DEMO)

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-full: setup
	$(BIN)/python -m pip install --quiet 'tensorrt-rtx>=1.7' || echo "TensorRT-RTX is not installed: its tests are left out"
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: setup
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python tools/gpu_check.py --work build/gpu-check --out build/gpu-check.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build $(VENV) *.egg-info
