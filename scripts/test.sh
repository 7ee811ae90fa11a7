#!/usr/bin/env bash
# Usage: scripts/test.sh [words for pytest ...]
# Sets everything up, then runs the linter, the type checker, the contracts of imports, the audit of the locked packages (where the network allows it)
# and the tests.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh" --dev
cd "$root"
python=$root/.venv/bin/python
set -x
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
PYTHONPATH=$root "$root/.venv/bin/lint-imports" --no-cache
"$python" scripts/audit.py
# A file of tests more than there are cores, each on one of them: processes that tests start and stop are waited for.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" -m pytest -n $(($(nproc) + 1)) --dist loadfile "$@"
