#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes: tests, then benchmarks against their limits.
#   bash bench/gpu.sh [--out DIR] [--tune] [--soak 10m] [--sanitize] [--rehearse] [SUITE ...]
# Suites: tests decode prefill moves overhead transfers store model mixed. --soak and --sanitize take longer, and are run alone.
# Needs torch with CUDA, triton, pytest and hypothesis; nothing is installed. PYTHON says which interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
exec env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1 "$PYTHON" -m bench.gpu "$@"
