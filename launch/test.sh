#!/usr/bin/env bash
# Installs what is missing and runs all checks: ruff, mypy, pytest. Arguments go to pytest:
#   bash launch/test.sh -m slow
#   bash launch/test.sh tests/model -x
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
help_if_asked "$@"

make_environment dev
say "ruff"
"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m ruff format --check --quiet . || fail "files are not formatted; run: $VENV/bin/python -m ruff format ."
say "mypy"
"$VENV/bin/python" -m mypy
say "pytest"
"$VENV/bin/python" -m pytest -q "$@"
