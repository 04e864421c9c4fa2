#!/usr/bin/env bash
# Train a recipe on several ranks, of one node or of many; the arguments are those of megaresnorm train.
#   bash launch/torchrun.sh configs/quickstart.yaml parallel.tp=2
#   NODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash launch/torchrun.sh configs/quickstart.yaml parallel.tp=8   # on every node
# Environment:
#   RANKS_PER_NODE   ranks to start here [the number of GPUs, or 2 without one]
#   NODES NODE_RANK  how many nodes, and which one this is, from 0 [1, 0]
#   MASTER_ADDR MASTER_PORT   where node 0 can be reached [localhost, 29500]
#   VENV             the environment to use [.venv]; nodes that share a folder must not make it at once: start one node's script first
# Ctrl-C and SIGTERM save a checkpoint; torchrun gives the ranks 30 seconds for it.
set -euo pipefail
started_in=$PWD
cd "$(dirname "$0")/.."
source launch/environment.sh
help_if_asked "$@"
[ $# -gt 0 ] || fail "which recipe? bash launch/torchrun.sh configs/quickstart.yaml (see --help)"
make_environment ""

if [ -z "${RANKS_PER_NODE:-}" ]; then
  RANKS_PER_NODE=$("$VENV/bin/python" -c 'import torch; print(torch.cuda.device_count() or 2)')
fi
# Several ranks of several threads each would fight for the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Workers that share the launcher's store find dead addresses in it after a restart.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [ "${NODES:-1}" -gt 1 ]; then
  [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ] || fail "NODES=$NODES needs NODE_RANK and MASTER_ADDR on every node"
  nodes=(--nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
  nodes=(--standalone)
fi
case "$VENV" in /*) ;; *) VENV=$PWD/$VENV ;; esac
cd "$started_in"
exec "$VENV/bin/torchrun" "${nodes[@]}" --nproc-per-node "$RANKS_PER_NODE" -m megaresnorm.cli train "$@"
