#!/usr/bin/env bash
# Installs what is missing and runs all checks: ruff, codespell, mypy, pytest. Arguments go to pytest:
#   bash launch/test.sh -m slow
#   bash launch/test.sh tests/model -x
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
help_if_asked "$@"

make_environment dev
say "ruff"
"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m ruff format --check --quiet . \
  || fail "files are not formatted; run: $VENV/bin/python -m ruff format ."
say "codespell"
"$VENV/bin/python" -m codespell_lib
say "mypy"
"$VENV/bin/python" -m mypy
say "pytest"
[ $# -eq 0 ] || exec "$VENV/bin/python" -m pytest -q "$@"
usual="not slow and not gpu and not gpu_all and not te and not apex"
workers=$(nproc 2>/dev/null || echo 2)
OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest -q -n "$((workers < 4 ? workers : 4))" --dist worksteal \
  -m "$usual and not alone"
say "pytest, one after the other: tests that start several ranks"
"$VENV/bin/python" -m pytest -q -m "$usual and alone"
