# Sourced by the scripts here: make_environment chooses the environment that they run in, VENV, and makes it where there
# is none. .venv, or a folder that is new or empty, gets what requirements.lock and constraints.txt name, once;
# PYTHON=... chooses the interpreter (3.10 or newer, with pip). Every other environment is used as it is, without
# network, and nothing is installed into it: one that VENV=... names, or one that is activated and has all that is
# needed.

say() { printf '\n==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

PYTHON=${PYTHON:-python3}

help_if_asked() { # the script's arguments; prints the comment at its top
  case "${1:-}" in -h | --help)
    sed -n '2,/^set /{/^# /s/^# //p}' "launch/$(basename "$0")"
    exit 0
    ;;
  esac
}

make_environment() { # $1: extras of pyproject.toml, may be empty. Sets VENV, and MEGARESNORM, the words of the command
  choose_environment "${1:-}"
  if is_ours "${1:-}"; then
    install_what_is_missing "${1:-}"
    MEGARESNORM=("$VENV/bin/megaresnorm")
    say "using $VENV: $(contents "${1:-}")"
  else
    local found
    [ -x "$VENV/bin/python" ] || fail "$VENV exists and is not a virtual environment; set VENV=another-folder"
    check_version "$VENV/bin/python"
    found=$(contents "${1:-}" 2>&1) || fail "$VENV was not made here and is used as it is, but $found"
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # this folder's megaresnorm, installed there or not
    MEGARESNORM=("$VENV/bin/python" -m megaresnorm.cli)
    say "using $VENV as it is: $found"
  fi
}

choose_environment() { # $1: extras. VENV, else what is activated if it has all, else .venv
  [ -z "${VENV:-}" ] || return 0
  local active
  for active in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
    if [ -n "$active" ] && VENV=$active contents "$1" >/dev/null 2>&1; then
      VENV=$active
      [ "$active" != "$PWD/.venv" ] || VENV=.venv
      return 0
    fi
  done
  VENV=.venv
}

contents() { # $1: extras. One line: Python and torch of $VENV, or on stderr what is missing there
  "$VENV/bin/python" launch/check_environment.py "$1"
}

is_ours() { # $1: extras. Whether packages may be installed into $VENV
  is_empty "$VENV" || [ -f "$VENV/.megaresnorm" ] && return
  [ -f "$VENV/pyvenv.cfg" ] || return 1
  # Made here before there was that file; or it is the usual folder and not ready, and no other torch is there than a
  # build of the pinned version (one for CPUs only saves gigabytes), which is kept.
  [ -f "$VENV/.megaresnorm-run" ] || [ -f "$VENV/.megaresnorm-dev" ] \
    || { [ "$VENV" = .venv ] && has_pip && ! contents "$1" >/dev/null 2>&1 && has_no_other_torch; } || return 1
  touch "$VENV/.megaresnorm"
}

is_empty() { [ ! -e "$1" ] || { [ -d "$1" ] && [ -z "$(ls -A "$1")" ]; }; }

has_pip() { "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }

has_no_other_torch() {
  local pinned
  pinned=$(sed -n 's/^torch==//p' constraints.txt)
  "$VENV/bin/python" - "$pinned" <<'PYTHON'
import importlib.metadata, sys
try:
    found = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit(0)
sys.exit(found.split("+")[0] != sys.argv[1])
PYTHON
}

install_what_is_missing() { # $1: extras. Of an environment of our own; what dev has is enough for all
  local stamp wanted
  wanted=$(cat pyproject.toml constraints.txt requirements.lock | cksum)
  for stamp in "$VENV/.megaresnorm-${1:-run}" "$VENV/.megaresnorm-dev"; do
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && contents "$1" >/dev/null 2>&1; then return 0; fi
  done
  make_venv
  # What is in PYTHONPATH or in this folder is not of the environment.
  local install=(env -u PYTHONPATH "$VENV/bin/python" -I -m pip install --quiet --disable-pip-version-check)
  say "installing what requirements.lock names, each file checked by its digest"
  "${install[@]}" --require-hashes --no-deps --requirement requirements.lock || cannot_install
  # Before any package that could decide which one is taken. A build of the pinned version that is there is kept.
  say "installing torch (the pinned version; a minute or more)"
  "${install[@]}" --constraint constraints.txt torch || cannot_install
  say "installing megaresnorm${1:+ with the extras $1}"
  # Built by the setuptools of the lock, for one in an environment of its own would be any.
  if [ -n "$1" ]; then
    "${install[@]}" --constraint constraints.txt --no-build-isolation --editable ".[$1]" || cannot_install
  else
    "${install[@]}" --no-deps --no-build-isolation --editable . || cannot_install
  fi
  echo "$wanted" >"$VENV/.megaresnorm-${1:-run}"
}

cannot_install() {
  fail "pip could not install (see above); without network set VENV=/an/environment/that/has/what/pyproject.toml/names"
}

make_venv() { # a virtual environment with pip in $VENV; one of ours that was not finished is made again
  has_pip && return
  # Of one that was only adopted the file is empty: it is never removed.
  is_empty "$VENV" || [ -s "$VENV/.megaresnorm" ] \
    || fail "$VENV exists and is not a virtual environment; set VENV=another-folder"
  command -v "$PYTHON" >/dev/null \
    || fail "$PYTHON not found; install Python 3.10 or newer, or set PYTHON=/path/to/python3"
  check_version "$PYTHON"
  say "making $VENV with $("$PYTHON" --version)"
  empty_venv
  "$PYTHON" -m venv "$VENV" && return
  # Some distributions ship python3 without what the venv module needs to bring pip.
  say "the venv module cannot bring pip here; trying virtualenv"
  empty_venv
  { "$PYTHON" -m pip install --quiet --user virtualenv \
    || "$PYTHON" -m pip install --quiet --user --break-system-packages virtualenv; } \
    && "$PYTHON" -m virtualenv --quiet "$VENV" \
    || fail "cannot make a virtual environment; install python3-venv (Debian, Ubuntu) or virtualenv"
}

empty_venv() { # a folder that says that it is ours before anything else is in it
  rm -rf "$VENV"
  mkdir -p "$VENV"
  echo "Made by launch/environment.sh, which installs into it and may make it again." >"$VENV/.megaresnorm"
}

check_version() { # $1: a Python
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || fail "$("$1" --version) is too old; MegaResNorm needs Python 3.10 or newer (set PYTHON=/path/to/python3)"
}
