#!/usr/bin/env bash
# Makes constraints.txt and requirements.lock again from pyproject.toml. Needs network; leaves nothing else behind.
#   bash tools/lock.sh                           # keeps every version that pyproject.toml still allows
#   bash tools/lock.sh --upgrade-package numpy   # arguments go to uv pip compile; --upgrade takes all that is new
#   TORCH=2.13.0 bash tools/lock.sh              # another torch, which otherwise stays, and is one for all
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
torch=torch==${TORCH:-$(sed -nE 's/^torch==([0-9.]+).*/\1/p' constraints.txt)}
compile() { # for every platform and every Python from 3.10 on; $1: file to write; setuptools builds the package
  printf '%s\n' "$torch" "setuptools>=77" \
    | "$work/venv/bin/uv" pip compile pyproject.toml - --quiet --universal --python-version 3.10 \
    --no-header --no-annotate --output-file "$@" >/dev/null
}
without() { awk -v names="^($1)" '/^[^ ]/ { wanted = $0 !~ names } wanted' "$2"; } # entries may have several lines

cp constraints.txt "$work/constraints.txt"
compile "$work/constraints.txt" --extra dev "$@"
compile "$work/requirements.lock" --constraint "$work/constraints.txt" --generate-hashes

{
  cat <<'TEXT'
# Versions that the tests ran with, of all that pyproject.toml names with the extra dev and of what that needs in turn.
# Not here: triton and the CUDA packages. A build of torch names its own exactly, and each build has others; where it
# names none (one for CPUs only), the tests take the newest triton.
# Made by tools/lock.sh; change a version with: bash tools/lock.sh --upgrade-package NAME
TEXT
  without 'triton==|nvidia-|cuda-' "$work/constraints.txt"
} >"$work/new"
cp "$work/new" constraints.txt
{
  cat <<'TEXT'
# What launch/quickstart.sh and launch/torchrun.sh install, with the digests of all files of each version: every
# platform, Python 3.10 on.
# Not here: torch, with triton and the CUDA packages that it brings. Which build fits depends on the machine (for CPUs
# only, for one CUDA or another), each has its own file and other packages, and most come from an index of PyTorch's. So
# torch has its version from constraints.txt, and no digest; all other packages that it needs are here.
# Made by tools/lock.sh from pyproject.toml and constraints.txt; make it again with: bash tools/lock.sh
TEXT
  without 'torch==|triton==|nvidia-|cuda-' "$work/requirements.lock"
} >"$work/new"
cp "$work/new" requirements.lock
