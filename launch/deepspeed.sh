#!/usr/bin/env bash
# Train a recipe on several hosts that DeepSpeed's launcher starts: one supervisor a host, which starts its ranks. The
# arguments are those of megaresnorm launch. DeepSpeed only starts the hosts: what trains is the native engine.
#   bash launch/deepspeed.sh configs/deepnorm-200-1b.yaml                      # by pdsh and ssh, from any of them
#   NO_SSH=1 NODE_RANK=0 bash launch/deepspeed.sh configs/deepnorm-200-1b.yaml   # without, on each
# Signals, restarts and exit codes are those of launch/torchrun.sh.
# Environment:
#   HOSTFILE         the hosts, one a line, as 'node0 slots=8'; the first is that of rank 0 [hosts]
#   NODES            how many hosts, the first of the list [all]
#   NO_SSH NODE_RANK NO_SSH=1: start this host alone, which is the one with that number, from 0, in the list
#   RANKS_PER_NODE   ranks of each host [its slots]
#   MASTER_ADDR MASTER_PORT   where the first host can be reached [as the list names it, 29500]
#   JOB_ID           name of the job, no other job's [from the recipe's file, and with ssh the time]
#   MAX_RESTARTS     how often ranks are started again without a new checkpoint [3]
#   LOG_DIR          folder for a file of each rank with all that it prints [none]
#   OMP_NUM_THREADS  threads of each rank [cores of the host / its ranks]
#   VENV             the environment to use, at the same path on all hosts [.venv]
set -euo pipefail
started_in=$PWD
cd "$(dirname "$0")/.."
source launch/environment.sh
help_if_asked "$@"
[ $# -gt 0 ] || fail "which recipe? bash launch/deepspeed.sh configs/deepnorm-200-1b.yaml (see --help)"
make_environment deepspeed

case "$VENV" in /*) ;; *) VENV=$PWD/$VENV ;; esac
cd "$started_in"
options=(--hostfile "${HOSTFILE:-hosts}")
given() { [ -z "${2:-}" ] || options+=("$1" "$2"); } # an option, where its variable is set
given --nodes "${NODES:-}"
given --ranks-per-node "${RANKS_PER_NODE:-}"
given --master-addr "${MASTER_ADDR:-}"
given --master-port "${MASTER_PORT:-}"
given --job "${JOB_ID:-}"
given --max-restarts "${MAX_RESTARTS:-}"
given --log-dir "${LOG_DIR:-}"
if [ -n "${NO_SSH:-}" ]; then
  options+=(--no-ssh)
  given --node-rank "${NODE_RANK:-}"
fi
# They are options now. The supervisor of this host would read them, too.
unset NODES NODE_RANK RANKS_PER_NODE MASTER_ADDR MASTER_PORT JOB_ID MAX_RESTARTS LOG_DIR
export PATH="$VENV/bin:$PATH" # of deepspeed, its launcher
exec "$VENV/bin/python" -m megaresnorm launch "$@" --with deepspeed "${options[@]}"
