# Every target makes the environment that it needs. PYTHON is any Python from 3.10 on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
PYTEST := -m pytest -n 2 --dist worksteal
TESTS := --durations=15 --doctest-modules tests tritonconv tritonconv_cli.py
KERNEL_TESTS := $(addsuffix .py,$(addprefix tests/test_,compat conv gradients grouped transposed batch_norm group_norm training \
	operators codegen host tune bench depthwise bands separable causal pooling unpool adaptive global_pool stochastic resample \
	shuffle squeeze_excite targets deform deform_rules))
# The oldest and the newest Triton that pyproject.toml admits.
OTHER_TRITONS := 3.6.0 3.9.0

# Two workers with two threads each wait for one another.
test test-all compat-%: export OMP_NUM_THREADS := 1
# All combinations that tests/matrix.py knows.
test-all compat-%: export TEST_ALL := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all fuzz lint format types bench host codegen codegen-check compat compat-quick docs clean

help: ## list the targets
	@grep -E '^[a-z.-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: $(VENV)/.with-demo ## train a small network on real images, convert it, run it on our kernels; writes demo.png
	$(BIN)/python -m tritonconv demo --picture demo.png

test: $(VENV)/.with-test ## tests and doctests, on the GPU when there is one, else in Triton's interpreter
	$(BIN)/python $(PYTEST) $(TESTS)

test-all: $(VENV)/.with-test ## the same with every combination of configs, types, layouts and passes
	$(BIN)/python $(PYTEST) $(TESTS)

fuzz: $(VENV)/.with-test ## random operators and networks against torch in fp64, up to 3 hours; stopped, it goes on where it was
	$(BIN)/python -m tests.fuzz --resume

lint: $(VENV)/.with-lint ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.with-lint ## correct the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.with-lint ## mypy
	$(BIN)/mypy

bench: $(VENV)/.with-test ## every kernel checked and timed on this GPU, 9 minutes; without one all but the clock
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -m benchmarks.gpu --budget 540 --out build/bench --resume; \
	else \
		echo 'No GPU: layers are counted, compiled and predicted, and nothing is timed.'; \
		$(BIN)/python -m benchmarks.gpu --dry-run; \
	fi

host: $(VENV)/.with-test ## what a call costs the host, no GPU needed
	$(BIN)/python -m benchmarks.host

# Interpreted kernels cannot be compiled.
CODEGEN := env -u TRITON_INTERPRET $(BIN)/python -m benchmarks.codegen

codegen: $(VENV)/.with-test ## write what the compiler makes of each kernel (registers, spills, instructions) into benchmarks/codegen.json
	$(CODEGEN)

codegen-check: $(VENV)/.with-test ## the same, compared with benchmarks/codegen.json
	$(CODEGEN) --check --whole

compat: test-all $(OTHER_TRITONS:%=compat-whole-%) ## the kernel tests under the oldest and the newest supported Triton too

compat-quick: $(OTHER_TRITONS:%=compat-quick-%) ## every kernel once under the oldest and the newest supported Triton

compat-whole-%: $(VENV)/triton-%/.ready
	PYTHONPATH=$(abspath $(<D)) $(BIN)/python $(PYTEST) $(KERNEL_TESTS)

compat-quick-%: $(VENV)/triton-%/.ready
	PYTHONPATH=$(abspath $(<D)) $(BIN)/python $(PYTEST) tests/test_compat.py

docs: $(VENV)/.with-docs ## the user's guide, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean: ## remove what the targets made
	rm -rf $(VENV) site demo.png build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv $*

# One stamp for each extra. Make must not delete them as intermediate files.
.PRECIOUS: %/bin/python $(VENV)/.with-% $(VENV)/triton-%/.ready
$(VENV)/.with-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP) -c constraints.txt -e '.[$*]'
	@touch $@

# torch pins its own Triton. Another one goes into a folder that comes before it on the path, and the rest is shared.
# Triton 3.6.0's interpreter fails with numpy 2.4.
$(VENV)/triton-3.6.0/.ready: NUMPY := 'numpy<2.4'
$(VENV)/triton-%/.ready: $(VENV)/.with-test
	rm -rf $(@D)
	$(BIN)/python $(PIP) --no-deps --target $(@D) 'triton==$*' $(NUMPY)
	PYTHONPATH=$(abspath $(@D)) $(BIN)/python -c 'import triton; assert triton.__version__ == "$*", triton.__version__'
	@touch $@
