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
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check --quiet . || fail "files are not formatted; run: $VENV/bin/ruff format ."
say "mypy"
"$VENV/bin/mypy"
say "pytest"
"$VENV/bin/python" -m pytest -q "$@"
