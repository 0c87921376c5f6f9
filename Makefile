# make setup     .venv with everything that the demo and the tests need
# make demo      export SmolLM2-135M, calibrate its exits, run it and show what was saved
# make test      the tests (under 12 minutes on 2 cores); after `make rtx` those of TensorRT-RTX too
# make rtx       TensorRT-RTX (230 MB; x86-64), which builds plans without a GPU
# make test-full the slow proofs as well, and TensorRT-RTX where it can be installed
# make test-gpu  what needs an NVIDIA GPU, and the file to send back
# make lint      ruff, formatter, mypy
#
# `make test-gpu` checks what is installed of these; .venv/bin/adainfer doctor says what is missing:
#   ort-cuda      .venv/bin/python -m pip uninstall onnxruntime onnxruntime-gpu   (one module)
#                 .venv/bin/python -m pip install --editable '.[cuda]'
#   TensorRT      .venv/bin/python -m pip install --editable '.[tensorrt]', and TensorRT itself
#   TensorRT-RTX  .venv/bin/python -m pip install --editable '.[tensorrt,tensorrt-rtx]', then
#                 make test-gpu BACKEND=tensorrt-rtx

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := build/demo
PIP := $(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt
TORCH := $(shell sed -n 's/^torch//p' constraints-cpu.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu
BACKEND ?= tensorrt
GPU_CHECK := $(BIN)/python tools/gpu_check.py --backend $(BACKEND)

.PHONY: setup demo rtx test test-full test-gpu lint format clean

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

rtx: setup
	$(PIP) 'tensorrt-rtx>=1.7'

# Where there is no TensorRT-RTX to be had, the last line says what that left out.
test-full: setup
	-$(MAKE) --no-print-directory rtx
	$(BIN)/python -m pytest -m "not gpu"
	@$(BIN)/python -c 'import tensorrt_rtx' 2>/dev/null \
		|| echo 'TensorRT-RTX could not be installed: the tests of it were LEFT OUT'

# Ends at once where nothing can be checked. The file is written even if a test fails.
test-gpu: setup
	@$(GPU_CHECK) --list
	@status=0; \
	$(BIN)/python -m pytest -m gpu || status=1; \
	$(GPU_CHECK) --work build/gpu-check --out build/gpu-check.json || status=1; \
	exit $$status

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build $(VENV) *.egg-info
