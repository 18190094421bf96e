# The project's habits. Each makes what it needs: a virtual environment in .venv, with the versions of constraints.txt.
#   make demo       the whole story on the tiny models
#   make test-8bit       quantised bases and the 8-bit optimiser, with bitsandbytes on the CPU, in .venv-8bit
#   make test-openclip   the extras [openclip], [fid] and [lpips] against their packages, in .venv-openclip
#   make test-browser    the labelling page in a headless browser: needs a `chromium` or `google-chrome` on the PATH
#   make test       the default tests          make test-slow   the long ones, all
#   make test-faults  of these the fault campaign: 100 kills, full disks, damaged files, 10,000 mutated recipes
#   make lint       ruff and mypy              make index       rewrite the list of methods
#   make assets     train the tiny models again (about 90 minutes on 2 cores)
# Variables: PYTHON (which interpreter makes .venv), PYTEST_ARGS, and TORCH_INDEX: the address of the index of CPU builds
# that pytorch.org names, where pip by itself would bring gigabytes of CUDA libraries to a laptop.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install test test-slow test-openclip test-8bit test-browser demo lint assets index

PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
LINKS := build/links/diffalign

help:
	@sed -n 's/^#   //p' Makefile

install: $(STAMP)

# torch first and alone, so that the pin picks the build before anything else asks for torch
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || { echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch setuptools
	@echo "installing diffalign and what it needs"
	@$(PIP) --no-build-isolation -e '.[test,dev,tensorboard,label]'
	@touch $@

# One thread a worker: the tests' tensors are too small to share. Work is stolen, so that a file's tests, and what they
# share, stay in one worker.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-slow: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# Beside a CPU build of torch an installed torchvision breaks diffusers, so these packages get an environment that only
# adds to .venv; tests/torchvision_hook.py makes the CUDA wheel of torchvision importable there.
EXTRAS := .venv-openclip
$(EXTRAS)/.installed: $(STAMP)
	@$(BIN)/python -m venv $(EXTRAS)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(EXTRAS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/diffalign-venv.pth
	@$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0 \
	  open-clip-torch==3.3.0 timm==1.0.31 torch-fidelity==0.4.0 lpips==0.1.4
	@touch $@

EIGHT := .venv-8bit
$(EIGHT)/.installed: $(STAMP)
	@$(BIN)/python -m venv $(EIGHT)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(EIGHT)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/diffalign-venv.pth
	@$(EIGHT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps bitsandbytes==0.50.2
	@touch $@

test-8bit: $(EIGHT)/.installed
	@OMP_NUM_THREADS=1 $(EIGHT)/bin/python -m pytest tests/test_quantise.py $(PYTEST_ARGS)

test-openclip: $(EXTRAS)/.installed
	@OMP_NUM_THREADS=1 $(EXTRAS)/bin/python -m pytest tests/test_eval_openclip.py tests/test_eval_extras.py $(PYTEST_ARGS)

test-browser: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/test_label_browser.py $(PYTEST_ARGS)

test-faults: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -rA --durations=0 tests/test_faults*.py $(PYTEST_ARGS)

demo: $(STAMP)
	@$(BIN)/diffalign demo

# All three speak before it fails. mypy sees the installed layout (eval/ as diffalign.eval, ...) through links.
lint: $(STAMP)
	@rm -rf $(LINKS) && mkdir -p $(LINKS)
	@ln -s $(CURDIR)/diffalign/* $(foreach part,eval pipelines configs assets,$(CURDIR)/$(part)) $(LINKS)/
	@failed=; \
	$(BIN)/ruff check || failed=1; \
	$(BIN)/ruff format --check || failed=1; \
	$(BIN)/mypy || failed=1; \
	test -z "$$failed"

assets: $(STAMP)
	@$(BIN)/python -m diffalign.assets.build

index: $(STAMP)
	@$(BIN)/python -m diffalign.methods.index
