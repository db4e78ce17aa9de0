# make demo    set up and ask the demo model a few sums      make test      set up and run the default suite
# make check   ruff, mypy strict, the docs                   make test-all  the suite with what is marked slow
# make bench-deps   set up what the benchmarks compare with
# make sanitize     native code under ASan, UBSan and TSan   make sanitize-quick  the loader's and the pool's part

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
EXAMPLES := $(addprefix example_plugins/,minimal torch_model mistral_format gguf_format dcp_format)
NATIVE := CMakeLists.txt $(shell find cmake csrc/bindings csrc/cpu csrc/include csrc/src -type f)
SANITIZERS := address,undefined thread
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all check bench-deps sanitize sanitize-quick clean

demo: $(INSTALLED)
	$(BIN)/python example_plugins/minimal/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" --ignore tests/docs

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/docs

bench-deps: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'

sanitize: sanitize-quick
	@set -e; PATH="$(CURDIR)/$(BIN):$$PATH"; for its in $(SANITIZERS); do \
	  folder=build/sanitize/cpu-$$its; \
	  cmake -S csrc/cpu -B $$folder -DCMAKE_BUILD_TYPE=Sanitize -DCMAKE_CXX_FLAGS=-O1 -DINFINILM_CPU_TESTS=ON \
	    -DINFINILM_CPU_SANITIZE=$$its > /dev/null; \
	  cmake --build $$folder --parallel 2 > /dev/null; \
	  ctest --test-dir $$folder --output-on-failure; \
	done

sanitize-quick: $(INSTALLED)
	@set -e; PATH="$(CURDIR)/$(BIN):$$PATH"; for its in $(SANITIZERS); do \
	  folder=build/sanitize/loader-$$its; \
	  cmake -S csrc/tests -B $$folder -DSANITIZE=$$its > /dev/null; \
	  cmake --build $$folder --parallel 2 > /dev/null; \
	  ctest --test-dir $$folder --output-on-failure; \
	done

$(INSTALLED): pyproject.toml constraints.txt $(EXAMPLES:=/pyproject.toml) $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, and $(PYTHON) is {sys.version}")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]' $(addprefix --editable ,$(EXAMPLES))
	@touch $@

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
