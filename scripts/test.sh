#!/usr/bin/env bash
# Sets up and runs everything that is checked: linter, formatter, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements-dev.txt
ruff check .
ruff format --check .
mypy
python scripts/check_collected.py
OMP_NUM_THREADS=1 python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile "$@"
