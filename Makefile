# Everything on a fresh machine: each target but gpu-check makes .venv and installs what it needs first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= bench-out

.PHONY: bench test quick soak test-oldest oldest-slice gpu-check lint typecheck docs clean

bench: $(VENV)/.bench
	$(BIN)/rjepa bench scaling --out $(OUT)

# Tests run in as many processes as there are cores. A test that hangs is stopped after ten minutes.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal --timeout 600

test: $(VENV)/.test
	$(PYTEST) --durations 20

# Hours: every fuzz test with all its cases (docs/reliability.md), whose counts are printed at the end.
soak: $(VENV)/.test
	RJEPA_SOAK=1 $(BIN)/python -m pytest -n auto --dist worksteal --timeout 14400 --durations 20 tests/fuzz

# The oldest versions that are promised, in an environment of their own: Python 3.12, torch 2.11, Triton 3.6 and numpy
# below 2.4, with which Triton 3.6's interpreter can't run. `oldest-slice` runs what depends on them most.
OLDEST        := build/oldest
OLDEST_PYTHON ?= python3.12
OLDEST_SLICE  := online/test_compiled.py online/test_operators.py backend/test_operations.py kernels/test_gamma_read.py \
	backend/native/test_calls.py::test_under_torch_compile_with_a_full_graph bench/kernels/test_static.py

test-oldest: $(OLDEST)/.made
	$(OLDEST)/bin/python -m pytest -n auto --dist worksteal --timeout 600 --durations 20

oldest-slice: $(OLDEST)/.made
	$(OLDEST)/bin/python -m pytest -n auto --dist worksteal --timeout 600 -q $(addprefix tests/,$(OLDEST_SLICE))

$(OLDEST)/.made: pyproject.toml
	$(OLDEST_PYTHON) -c "import sys; sys.exit(sys.version_info[:2] != (3, 12) and 'Python 3.12 is needed: make OLDEST_PYTHON=path')"
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -e '.[test]' 'torch==2.11.*' 'triton==3.6.*' 'numpy<2.4'
	touch $@

# The same slice, less the machine code, with the newest versions on another Python that is promised: `make slice-3.13`.
slice-%: build/python%/.made
	build/python$*/bin/python -m pytest -n auto --dist worksteal --timeout 600 -q $(addprefix tests/,$(filter-out %/test_static.py,$(OLDEST_SLICE)))

.PRECIOUS: build/python%/.made
build/python%/.made: pyproject.toml
	python$* -m venv build/python$*
	build/python$*/bin/pip install -e '.[test]'
	touch $@

# In a minute or so, while one thinks: lint, types, and of each wing the tests that a change is most likely to break.
QUICK := test_house.py cells rules/test_rfp.py rules/test_rounding.py backend/test_table.py backend/test_buffers.py \
	backend/native/test_gamma.py layers/test_named.py layers/test_functional.py layers/test_conv.py online/test_stack.py \
	online/test_fidelity.py online/test_cuda_graph.py planning rjepa/test_rows.py rjepa/test_fixations.py \
	rjepa/test_sidecar.py rjepa/test_config.py rjepa/test_split.py rjepa/test_scanpath.py rjepa/test_model.py \
	rjepa/test_diagnostics.py bench/harness/test_record.py bench/harness/test_compare.py \
	bench/harness/test_statistics.py bench/test_cli.py::test_user_errors_exit_2

quick: lint typecheck
	$(PYTEST) -q $(addprefix tests/,$(QUICK))

# On a machine with a GPU whose own python has torch, triton and what the extra `test` names: every kernel once, tests
# of what runs on the GPU, kernels against the roofline, scaling, plots, in at most seven minutes. $(OUT) gets a page, a
# summary and an archive, renewed after each stage; a rerun goes on. Exits 2 without a GPU; REHEARSE=1 runs all of it on
# the CPU, with stand-ins.
gpu-check:
	$(PYTHON) -m rjepa_triton.bench.report.gpu_check --out $(OUT)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A built copy, so that what is checked is what users get: kernels/ and bench/ under their installed names.
typecheck: $(VENV)/.dev
	rm -rf build/typecheck build/lib
	$(BIN)/pip install --quiet --no-deps --target build/typecheck .
	cd build/typecheck && MYPYPATH=. ../../$(BIN)/mypy --cache-dir ../../.mypy_cache --config-file ../../pyproject.toml -p rjepa_triton

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
