# Sourced by quickstart.sh and test.sh: makes .venv with what setup.py and constraints.txt name, once.
# Needs python3 (3.10 or newer) and pip. PYTHON=... chooses another interpreter, VENV=... another folder.

say() { printf '\n==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

make_environment() { # $1: extras of setup.py, may be empty
  command -v "$PYTHON" >/dev/null || fail "$PYTHON not found; install Python 3.10 or newer, or set PYTHON=/path/to/python3"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || fail "$("$PYTHON" --version) is too old; MegaResNorm needs Python 3.10 or newer (set PYTHON=/path/to/python3)"
  local stamp="$VENV/.megaresnorm-${1:-run}"
  local wanted
  wanted=$(cat setup.py constraints.txt | cksum)
  if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    say "using $VENV ($("$VENV/bin/python" --version))"
    return
  fi
  if [ ! -x "$VENV/bin/python" ]; then
    say "making $VENV with $("$PYTHON" --version)"
    # Some distributions ship python3 without the venv module's bootstrap.
    "$PYTHON" -m venv "$VENV" 2>/dev/null || {
      rm -rf "$VENV"
      "$PYTHON" -m pip install --quiet --user virtualenv 2>/dev/null || "$PYTHON" -m pip install --quiet --user --break-system-packages virtualenv
      "$PYTHON" -m virtualenv --quiet "$VENV"
    } || fail "cannot make a virtual environment; install python3-venv (Debian, Ubuntu) or virtualenv"
  fi
  local pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
  # torch first and pinned: left to a range, pip may choose a build with gigabytes of CUDA libraries.
  say "installing torch (the pinned version; a minute or two)"
  "${pip[@]}" torch
  say "installing megaresnorm${1:+ with the extras $1}"
  "${pip[@]}" --editable ".${1:+[$1]}"
  echo "$wanted" >"$stamp"
}
