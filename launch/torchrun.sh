#!/usr/bin/env bash
# Train a recipe on several ranks, of one node or of many; the arguments are those of megaresnorm launch.
#   bash launch/torchrun.sh configs/quickstart.yaml parallel.tp=2
#   NODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash launch/torchrun.sh configs/quickstart.yaml parallel.tp=8  # on every node
#   NODES=2:4 MASTER_ADDR=node0 bash launch/torchrun.sh ...   # elastic: from 2 to 4 nodes, which may come and go
# A rank that dies is started again with all others, and they go on from the newest checkpoint.
# SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint on the step at hand, however long that takes; a second one ends at once.
# Environment:
#   RANKS_PER_NODE   ranks to start here [the number of GPUs, or 2 without one]
#   NODES NODE_RANK  how many nodes, and which one this is, from 0 [1, 0]; NODES=MIN:MAX needs no NODE_RANK
#   MASTER_ADDR MASTER_PORT   where node 0 can be reached; needed with several nodes [none, 29500]
#   JOB_ID           name of the job, the same on all nodes and no other job's [from MASTER_ADDR and MASTER_PORT]
#   MAX_RESTARTS     how often ranks are started again without a new checkpoint [3]
#   LOG_DIR          folder for a file of each rank with all that it prints [none]
#   OMP_NUM_THREADS  threads of each rank [cores of the node / ranks]
#   VENV             the environment to use [.venv]; nodes that share a folder must not make it at once: start one
#                    node's script first
# Exit codes are those of megaresnorm train (see its --help).
set -euo pipefail
started_in=$PWD
cd "$(dirname "$0")/.."
source launch/environment.sh
help_if_asked "$@"
[ $# -gt 0 ] || fail "which recipe? bash launch/torchrun.sh configs/quickstart.yaml (see --help)"
make_environment ""

case "$VENV" in /*) ;; *) VENV=$PWD/$VENV ;; esac
cd "$started_in"
# From here on one process hears signals for all ranks: bash could not, where it was started with them ignored (cron,
# scripts).
exec "$VENV/bin/python" -m megaresnorm launch "$@"
