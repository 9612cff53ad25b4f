# All targets first create what they need: a virtual environment in .venv with pinned packages.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# A machine with an NVIDIA GPU gets PyTorch's CUDA build, which includes Triton. Other machines try the CPU build first
# (set PIP_EXTRA_INDEX_URL to PyTorch's index of it, or PIP_FIND_LINKS to a folder of wheels), which does not include it.
TORCH := 2.13.0
TRITON_FOR_CPU := 3.9.0

.PHONY: quickstart test lint

quickstart: $(INSTALLED)
	$(BIN)/lion-fast quickstart

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lion-fast needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	if nvidia-smi >/dev/null 2>&1; then \
		$(BIN)/python -m pip install -c constraints.txt torch==$(TORCH); \
	else \
		{ $(BIN)/python -m pip install -c constraints.txt torch==$(TORCH)+cpu || \
		  $(BIN)/python -m pip install -c constraints.txt torch==$(TORCH); } && \
		{ $(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install triton==$(TRITON_FOR_CPU); }; \
	fi
	$(BIN)/python -m pip install -c constraints.txt -e '.[quickstart,test,dev]'
	touch $@
