# `make demo` and `make test` need Python >= 3.10, a C++20 compiler and make; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The versions that tests and figures were made with. Named in every install: a bare `torch` may be another
# release and gigabytes of libraries that the CPU kernels never load.
TORCH ?= torch==2.13.0
SENTENCE_TRANSFORMERS ?= sentence-transformers==6.2.0
# 5.24 refuses every released peft (it wants 0.22), also where none is in use.
TRANSFORMERS ?= transformers==5.23.0

DEMO_ARGS ?=
TEST_ARGS ?=
# Processes, each of which takes whole files: what one test of a file computes or compiles, the next ones share.
TEST_JOBS ?= 2
BENCH_ARGS ?=

CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(CSRC) $(shell find tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu')
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-oldest loss-table bench bench-page bench-check docs fuzz sanitize cuda-link gpu-build gpu-check gpu-bench lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     train a small 2D Matryoshka model, offline (DEMO_ARGS='--steps 20' for less)"
	@echo "make test     run the tests (TEST_ARGS='-k losses' for some, TEST_JOBS=8 for 8 at a time)"
	@echo "make test-oldest  with the oldest torch, transformers and sentence-transformers supported (downloads gigabytes)"
	@echo "make bench    run the benchmarks; make bench-page writes docs/benchmarks.md from them"
	@echo "make bench-check  compare a few ratios with bounds, in a minute"
	@echo "make fuzz     2,500 random problems against float64"
	@echo "make loss-table write docs/losses.md"
	@echo "make docs     build the pages into build/site"
	@echo "make sanitize the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make cuda-link build, link and import the CUDA extension, no GPU needed (downloads gigabytes)"
	@echo "make gpu-check on a GPU: tests and compute-sanitizer   (both take PYTHON=, RESULTS=)"
	@echo "make gpu-bench on a GPU: times; PART=kernels, s1, s2, s3, pooled or step"
	@echo "make lint     ruff, mypy, clang-format: what CI checks"
	@echo "make format   let ruff and clang-format rewrite the sources"
	@echo "make install  what the others do first: make .venv, install torch and m2d_ext into it"
	@echo "make clean    remove build outputs; .venv stays"

$(VENV)/.torch: Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)' 'setuptools>=77.0.3' ninja
	touch $@

# The editable install compiles; ninja then redoes only what a change touches.
$(INSTALLED): $(VENV)/.torch pyproject.toml setup.py $(CSRC)
	$(BIN)/python -m pip install --quiet --no-build-isolation '$(TORCH)' '$(SENTENCE_TRANSFORMERS)' '$(TRANSFORMERS)' -e '.[demo,dev]'
	touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python examples/train_2d_matryoshka.py $(DEMO_ARGS)

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n $(TEST_JOBS) --dist loadfile $(TEST_ARGS)

# In an environment and a copy of their own. What the fused losses give here must come out there.
OLDEST := build/oldest
OLDEST_VERSIONS := 'torch==2.11.0' 'transformers==5.17.0' 'sentence-transformers==6.0.1'
test-oldest: $(INSTALLED)
	rm -rf $(OLDEST)/source && mkdir -p $(OLDEST)/source
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore tests/test_oldest_versions.py $(OLDEST)/outcomes.json
	git ls-files -z | xargs -0 cp --parents -t $(OLDEST)/source
	test -x $(OLDEST)/venv/bin/python || $(PYTHON) -m venv $(OLDEST)/venv
	$(OLDEST)/venv/bin/python -m pip install --quiet $(OLDEST_VERSIONS) 'setuptools>=77.0.3' ninja
	cd $(OLDEST)/source && M2D_BUILD=cpu ../venv/bin/python -m pip install --quiet --no-build-isolation \
		$(OLDEST_VERSIONS) -e '.[demo,dev]'
	cd $(OLDEST)/source && M2D_OUTCOMES=$(CURDIR)/$(OLDEST)/outcomes.json HF_HUB_OFFLINE=1 \
		../venv/bin/pytest -n $(TEST_JOBS) --dist loadfile $(TEST_ARGS)

bench: $(INSTALLED)
	mkdir -p build
	HF_HUB_OFFLINE=1 $(BIN)/pytest benchmarks --benchmark-json=build/bench.json $(BENCH_ARGS)

# docs/benchmarks.md and its plots, from the last whole `make bench`, and from more files that BENCH_JSON names.
BENCH_JSON ?= build/bench.json
bench-page:
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/report.py $(BENCH_JSON)

# Ratios within one run, against generous bounds: has the loss become much slower beside what it is compared with?
bench-check: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/check.py

fuzz: $(INSTALLED)
	M2D_FUZZ_EXAMPLES=2500 $(BIN)/pytest tests/test_fuzz.py

# docs/losses.md, from what every loss class of sentence-transformers does in ours. A test fails where it is stale.
loss-table: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python tests/test_surface.py

# Any warning ends it: a link that leads nowhere, a name that the API page cannot find.
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

# The sanitizers' runtime must be the first library of the process. The build goes to a folder of its own, beside a
# copy of the tests, so that the sources cannot be imported instead. LeakSanitizer would report the interpreter.
SANITIZED := build/sanitized
SANITIZER = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
sanitize: $(INSTALLED)
	rm -rf $(SANITIZED)
	M2D_SANITIZE=1 M2D_BUILD=cpu $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --target $(SANITIZED) .
	cp -R tests pyproject.toml $(SANITIZED)
	cd $(SANITIZED) && LD_PRELOAD="$(SANITIZER)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		PYTHONPATH=. $(CURDIR)/$(BIN)/pytest -p no:cacheprovider tests/test_functional.py tests/test_ops.py tests/test_deferred.py tests/test_similarity.py tests/test_fuzz.py

# The real extension, for one architecture, in an environment of its own: a CUDA build of torch beside the CPU one.
# Needs nvcc (CUDA_HOME), no GPU. Built from a copy: a build for another torch has no place among the checkout's objects.
CUDA_TORCH ?= torch==2.14.1
CUDA_ARCH ?= 9.0
LINKED := build/cuda-link
cuda-link:
	rm -rf $(LINKED)
	$(PYTHON) -m venv $(LINKED)/venv
	$(LINKED)/venv/bin/pip install --quiet '$(CUDA_TORCH)' '$(SENTENCE_TRANSFORMERS)' '$(TRANSFORMERS)' 'setuptools>=77.0.3' ninja
	mkdir $(LINKED)/source && cp -R csrc m2d_ext setup.py pyproject.toml README.md LICENSE $(LINKED)/source
	cd $(LINKED)/source && M2D_BUILD=cuda TORCH_CUDA_ARCH_LIST='$(CUDA_ARCH)' \
		../venv/bin/pip install --no-build-isolation --no-deps .
	cd $(LINKED) && venv/bin/python -c "import json, m2d_ext; print(json.dumps(m2d_ext.build_info(), indent=2))"

# On a machine with a GPU, with the Python that holds its torch: no .venv, nothing downloaded. The extension is built
# for the GPU that is there, into a folder of its own beside a copy of the tests.
GPU_BUILD := build/gpu
RESULTS ?= benchmarks/results
PART ?= kernels
gpu-build:
	$(PYTHON) benchmarks/gpu_build.py --output $(GPU_BUILD)

gpu-check: gpu-build
	$(PYTHON) benchmarks/gpu_check.py --build $(GPU_BUILD) --results $(RESULTS)

gpu-bench: gpu-build
	for part in $(PART); do $(PYTHON) benchmarks/gpu_bench.py $$part --build $(GPU_BUILD) --results $(RESULTS) $(BENCH_ARGS) || exit; done

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy m2d_ext
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

clean:
	rm -rf build dist *.egg-info m2d_ext/*.so m2d_ext/_build_config.json $(INSTALLED)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
