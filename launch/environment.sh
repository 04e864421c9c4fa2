# Sourced by the scripts here: makes .venv with what setup.py and constraints.txt name, once.
# Needs python3 (3.10 or newer) and pip. PYTHON=... chooses another interpreter, VENV=... another folder.

say() { printf '\n==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

help_if_asked() { # the script's arguments; prints the comment at its top
  case "${1:-}" in -h | --help)
    sed -n '2,/^set /{/^# /s/^# //p}' "launch/$(basename "$0")"
    exit 0
    ;;
  esac
}

make_environment() { # $1: extras of setup.py, may be empty
  command -v "$PYTHON" >/dev/null || fail "$PYTHON not found; install Python 3.10 or newer, or set PYTHON=/path/to/python3"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || fail "$("$PYTHON" --version) is too old; MegaResNorm needs Python 3.10 or newer (set PYTHON=/path/to/python3)"
  local stamp="$VENV/.megaresnorm-${1:-run}" wanted
  wanted=$(cat setup.py constraints.txt | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
    say "using $VENV ($("$VENV/bin/python" --version))"
    return
  fi
  make_venv
  local pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
  # torch first and at the pinned version, so that no other package decides which one is taken. A build of torch that is
  # in $VENV already (one for CPUs only saves gigabytes) is kept if it is that version.
  say "installing torch (the pinned version; a minute or more)"
  "${pip[@]}" torch
  say "installing megaresnorm${1:+ with the extras $1}"
  "${pip[@]}" --editable ".${1:+[$1]}"
  echo "$wanted" >"$stamp"
}

make_venv() { # a virtual environment with pip in $VENV; a half-made one is made again, anything else is left alone
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && return
  if [ -e "$VENV" ]; then
    [ -f "$VENV/pyvenv.cfg" ] || [ -z "$(ls -A "$VENV" 2>/dev/null)" ] \
      || fail "$VENV exists and is not a virtual environment; set VENV=another-folder"
    rm -rf "$VENV" # an empty folder, or an environment without pip that was never finished
  fi
  say "making $VENV with $("$PYTHON" --version)"
  "$PYTHON" -m venv "$VENV" && return
  # Some distributions ship python3 without what the venv module needs to bring pip.
  rm -rf "$VENV"
  say "the venv module cannot bring pip here; trying virtualenv"
  { "$PYTHON" -m pip install --quiet --user virtualenv || "$PYTHON" -m pip install --quiet --user --break-system-packages virtualenv; } \
    && "$PYTHON" -m virtualenv --quiet "$VENV" \
    || fail "cannot make a virtual environment; install python3-venv (Debian, Ubuntu) or virtualenv"
}
