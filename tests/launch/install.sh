#!/usr/bin/env bash
# What the tests of this folder run beside MegaResNorm, from Debian's packages; each test is skipped without its own.
set -euo pipefail
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
  iproute2 openssh-server openssh-client pdsh openmpi-bin slurm-wlm munge procps
