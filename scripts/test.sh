#!/usr/bin/env bash
# Usage: scripts/test.sh [words for pytest ...]
# Sets everything up, then runs the linter, the type checker, the audit of the locked packages (where the network allows it)
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
"$python" scripts/audit.py
"$python" -m pytest "$@"
