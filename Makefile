# Every target sets up what it needs in .venv and changes nothing outside it (downloads go to pip's and elo's caches).
#   make demo     the whole method on a real small model, with a table and a plot at the end
#   make test     the tests; on a machine with a GPU the kernels' tests run on it too
#   make test-all   the same, with every kernel compiled for every kind of card and not for one each
#   make test-oldest   the model families with the oldest packages that pyproject.toml allows, in .venv-oldest
#   make lint     ruff, mypy, and the audit
#   make audit    known vulnerabilities of what is installed, as far as the package index answers
#   make faults   the faults of docs/reliability.md: kills, signals, full disks, power loss, numbers that are none
#   make fuzz     the byte mover under AddressSanitizer and ThreadSanitizer, FUZZ_SECONDS=30 each; needs g++ or clang++
#   make fuzz-readers   20,000 mutated inputs for every reader of files; FUZZ_EXAMPLES=1000 takes fewer
#   make soak     2,000 steps with kills, and memory and descriptors watched; minutes
#   make scale    corpora of gigabytes, 100,000 tensors, 200 shards: time and memory; SCALE="--corpus-mb 500" is shorter
#   make bench    the pipeline speedup of this machine, within ten minutes; BENCH="--model llama-3.2-1b" passes options on
#   make card     every figure that is asked of a GPU, within ten minutes; CARD="--minutes 60" passes options on
#   make setup    .venv with the `elo` command, for use by hand: .venv/bin/elo --help
# PYTHON=python3.12 chooses the interpreter of a new .venv; CONSTRAINTS=/dev/null takes the newest versions allowed.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
CPU_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# pip would compile thousands of files one after another; this takes all cores, and leaves what does not compile. The
# models of transformers, torch's compiler and others' tests are a third of all: what of them is used, Python compiles.
INSTALL := $(PIP) install --quiet --no-compile
LATER := transformers/models/|torch/(_inductor|testing)/|/tests/
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '$(LATER)' .venv/lib || true
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: setup demo test test-all test-oldest lint .mypy audit faults fuzz fuzz-readers soak scale bench card clean
.DELETE_ON_ERROR:

setup: .venv/.stamp

demo: .venv/.stamp
	$(BIN)/elo demo

# Compiled once, also where the environment says otherwise: tests start many processes that import all of it.
test: export PYTHONDONTWRITEBYTECODE =
test: .venv/.stamp-test
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

test-all: export ALL_TARGETS = 1
test-all: test

test-oldest: export PYTHONDONTWRITEBYTECODE =
test-oldest: .venv-oldest/.stamp
	.venv-oldest/bin/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal tests/test_families*.py tests/test_longrope.py

lint: .venv/.stamp-test
	$(BIN)/ruff check .
	@+$(MAKE) --no-print-directory -j2 .mypy audit

.mypy: .venv/.stamp-test
	$(BIN)/mypy

# What cannot be asked about is no vulnerability, and is said: without a network, or with an index that has packages alone,
# nothing is known.
AUDIT := build/audit.txt

audit: .venv/.stamp-test
	@mkdir -p $(dir $(AUDIT)); timeout 120 $(BIN)/pip-audit --skip-editable --progress-spinner off > $(AUDIT) 2>&1; \
	if grep -qE '^Found [0-9]+ known' $(AUDIT); then cat $(AUDIT) >&2; exit 1; fi; \
	grep -E '^No known' $(AUDIT) || echo "audit: it could not be made here: $$(tail -n 1 $(AUDIT))"; \
	echo "audit: $$(grep -c 'could not be audited' $(AUDIT)) packages could not be asked about"

# The folder, and the tests beside it that the table names.
FAULTS = tests/faults $(shell grep -oE '`test_[a-z_0-9]+\.py::test_[a-z_0-9]+' docs/reliability.md | tr -d '`' | sort -u | sed 's|^|tests/|')

faults: export PYTHONDONTWRITEBYTECODE =
faults: .venv/.stamp-test
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(FAULTS)

# Own random inputs, so that any compiler will do; csrc/fuzz/fuzz_mover.cpp says how clang's libFuzzer drives the same target.
FUZZ_SECONDS ?= 30
MOVER := csrc/mover.cpp csrc/guarded_copy.cpp
SANITIZED := -std=c++17 -O1 -g -Wall -Wextra -pthread

fuzz: build/fuzz/fuzz_mover build/fuzz/stress_ring
	build/fuzz/fuzz_mover $(FUZZ_SECONDS)
	build/fuzz/stress_ring $(FUZZ_SECONDS)

build/fuzz/fuzz_mover: csrc/fuzz/fuzz_mover.cpp $(MOVER) $(wildcard csrc/*.h)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZED) -fsanitize=address,undefined -fno-sanitize-recover=all -DOWN_MAIN $< $(MOVER) -o $@

build/fuzz/stress_ring: csrc/fuzz/stress_ring.cpp $(MOVER) $(wildcard csrc/*.h)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZED) -fsanitize=thread $< $(MOVER) -o $@

FUZZ_EXAMPLES ?= 20000

fuzz-readers: export PYTHONDONTWRITEBYTECODE =
fuzz-readers: .venv/.stamp-test
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q -rP -n auto --maxprocesses 4 tests/test_fuzz_readers.py

soak: .venv/.stamp-test
	$(BIN)/python tests/faults/soak.py $(SOAK)

scale: .venv/.stamp-test
	$(BIN)/python tests/faults/scale.py $(SCALE)

bench: .venv/.stamp-bench
	$(BIN)/elo bench speedup $(BENCH)

card: .venv/.stamp-bench .venv/.stamp-test
	$(BIN)/elo bench card $(CARD)

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info elo_engine/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "elo-engine needs Python 3.11 or newer and $(PYTHON) is older; name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# Before anything else is installed, and by itself: what installs two things side by side is not to change meanwhile.
.venv/.pip: constraints.txt | $(BIN)/python
	@$(INSTALL) --retries 1 --timeout 15 -c $(CONSTRAINTS) pip || echo "pip: it stays as it is, which may be slower"
	@touch $@

# torch comes first and by itself, so that nothing else decides its build. Without a GPU the CPU build saves gigabytes of
# CUDA libraries; --no-deps, because its index has torch but not the pinned versions of what torch needs. Where that
# index cannot be reached, and with a GPU, the packages below bring it from pip's own, as they bring what it needs.
.venv/.torch: constraints.txt .venv/.pip
	@if nvidia-smi >/dev/null 2>&1; then \
		echo "torch: this machine has an NVIDIA GPU, so the CUDA build"; \
	else \
		echo "torch: no NVIDIA GPU here, so the CPU build"; \
		$(INSTALL) --no-deps --retries 0 --timeout 5 --index-url $(CPU_INDEX) -c $(CONSTRAINTS) torch \
		|| echo "torch: its CPU index does not answer, trying pip's own"; \
	fi
	@touch $@

# The C++ extension compiles while the packages come, each on a core: `--no-deps` here, and the packages by themselves.
.venv/.extension: $(SOURCES) .venv/.pip
	$(INSTALL) -c $(CONSTRAINTS) --no-deps -e .
	@touch $@

.venv/.packages-%: .venv/.torch pyproject.toml constraints.txt
	@$(BIN)/python -c 'import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*p["dependencies"], *(d for e in sys.argv[1].split("-") for d in p["optional-dependencies"][e]), sep="\n")' \
		$* > .venv/packages-$*.txt
	$(INSTALL) -c $(CONSTRAINTS) -r .venv/packages-$*.txt
	@touch $@

BOTH := $(MAKE) --no-print-directory -j2 .venv/.extension

.venv/.stamp: $(SOURCES) | $(BIN)/python
	@+$(BOTH) .venv/.packages-demo
	@$(COMPILE)
	@touch $@

# triton (extra gpu) is for the kernels' tests, which interpret and compile them without a GPU.
.venv/.stamp-test: $(SOURCES) | $(BIN)/python
	@+$(BOTH) .venv/.packages-demo-dev-gpu-test
	@$(COMPILE)
	@touch $@ .venv/.stamp

.venv/.stamp-bench: $(SOURCES) | $(BIN)/python
	@+$(BOTH) .venv/.packages-bench
	@$(COMPILE)
	@touch $@ .venv/.stamp

# As above; a package that constraints-oldest.txt names loses its line of constraints.txt.
.venv-oldest/.stamp: $(SOURCES) constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	awk -F'[=<>]' '/^#/ {next} FNR == NR {named[$$1]; print; next} !($$1 in named)' constraints-oldest.txt constraints.txt \
		> .venv-oldest/constraints.txt
	nvidia-smi >/dev/null 2>&1 || .venv-oldest/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
		--retries 0 --timeout 5 --index-url $(CPU_INDEX) -c constraints.txt torch || true
	.venv-oldest/bin/python -m pip --disable-pip-version-check install --quiet -c .venv-oldest/constraints.txt -e '.[test]'
	@touch $@
