# Everything on a fresh machine: each target but gpu-check makes .venv and installs what it needs first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= bench-out

.PHONY: bench test gpu-check lint typecheck docs clean

bench: $(VENV)/.bench
	$(BIN)/rjepa bench scaling --out $(OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest

# On a machine with a GPU whose own python has torch, triton and what the extra `test` names: tests of what runs on
# the GPU, kernels against the roofline, scaling, plots, in under nine minutes, into $(OUT). Exits 2 without a GPU.
gpu-check:
	$(PYTHON) -m rjepa_triton.bench.report.gpu_check --out $(OUT)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A built copy, so that what is checked is what users get: kernels/ and bench/ under their installed names.
typecheck: $(VENV)/.dev
	rm -rf build/typecheck build/lib
	$(BIN)/pip install --quiet --no-deps --target build/typecheck .
	cd build/typecheck && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p rjepa_triton

# The documentation as a site, build/site/index.html. Loads nothing from elsewhere.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build *.egg-info

# $(VENV)/.EXTRA says that the extra is installed as pyproject.toml now has it.
$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -e '.[$*]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
