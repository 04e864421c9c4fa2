#!/usr/bin/env bash
# Train a recipe on several ranks, of one node or of many; the arguments are those of megaresnorm train.
#   bash launch/torchrun.sh configs/quickstart.yaml parallel.tp=2
#   NODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash launch/torchrun.sh configs/quickstart.yaml parallel.tp=8   # on every node
#   NODES=2:4 MASTER_ADDR=node0 bash launch/torchrun.sh ...   # elastic: from 2 to 4 nodes, which may come and go
# A rank that dies is started again with all others, and they go on from the newest checkpoint.
# SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint on the step at hand, however long that takes; a second one ends at once.
# Environment:
#   RANKS_PER_NODE   ranks to start here [the number of GPUs, or 2 without one]
#   NODES NODE_RANK  how many nodes, and which one this is, from 0 [1, 0]; NODES=MIN:MAX needs no NODE_RANK
#   MASTER_ADDR MASTER_PORT   where node 0 can be reached [localhost, 29500]
#   JOB_ID           name of the job, the same on all nodes and no other job's [from MASTER_ADDR and MASTER_PORT]
#   MAX_RESTARTS     how often ranks are started again [3]
#   VENV             the environment to use [.venv]; nodes that share a folder must not make it at once: start one node's script first
# Exit codes are those of megaresnorm train (see its --help).
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
job=${JOB_ID:-megaresnorm-${MASTER_ADDR:-}-${MASTER_PORT:-29500}}
case "${NODES:-1}" in
  1) nodes=(--standalone) ;;
  *:*)
    [ -n "${MASTER_ADDR:-}" ] || fail "NODES=$NODES needs MASTER_ADDR on every node"
    nodes=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
      --rdzv-id "$job")
    ;;
  *)
    [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ] || fail "NODES=$NODES needs NODE_RANK and MASTER_ADDR on every node"
    # Not torchrun's static rendezvous, in which nodes would not hear that another starts its ranks again, or has ended.
    nodes=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id "$job"
      --rdzv-conf "is_host=$([ "$NODE_RANK" = 0 ] && echo 1 || echo 0)")
    ;;
esac
case "$VENV" in /*) ;; *) VENV=$PWD/$VENV ;; esac
cd "$started_in"

# torchrun starts again whatever does not end with 0, and after SIGTERM kills what is not gone in 30 seconds. So a rank that
# ends on purpose (stopped, or an error that another start would not mend) leaves its exit code in this folder and ends with 0; and
# signals go to the ranks themselves, torchrun's children, by word left here if they are only starting. torchrun takes no notice of
# them, for a whole job may be signalled; SIGQUIT ends it.
MEGARESNORM_LAUNCHER=$(mktemp -d)
export MEGARESNORM_LAUNCHER PET_SIGNALS_TO_HANDLE=SIGQUIT
case "${NODES:-1}" in *:*) export MEGARESNORM_ELASTIC=1 ;; esac
trap 'rm -rf "$MEGARESNORM_LAUNCHER"' EXIT
set -m # a process group of its own: Ctrl-C in a terminal reaches this script alone
(
  trap '' HUP INT TERM USR1 # the ranks listen again, as soon as they can save
  exec "$VENV/bin/torchrun" "${nodes[@]}" --nproc-per-node "$RANKS_PER_NODE" --max-restarts "${MAX_RESTARTS:-3}" \
    --monitor-interval 0.1 -m megaresnorm.cli train "$@" </dev/null
) &
torchrun=$!
stop=0 first=0 quit=0
pass_on() { # $1: signal, $2: its number
  local again=$((stop && SECONDS > first + 1)) ranks
  if [ "$stop" = 0 ]; then stop=$((128 + $2)) first=$SECONDS; fi
  echo "$stop" >"$MEGARESNORM_LAUNCHER/stop" || true
  ranks=$(cat "/proc/$torchrun/task/$torchrun/children" 2>/dev/null || true)
  # shellcheck disable=SC2086 # several process ids
  [ -z "$ranks" ] || kill -"$1" $ranks 2>/dev/null || true
  if [ -z "$ranks" ] || [ "$again" = 1 ]; then # nothing to save yet, or no wish to
    quit=1
    kill -QUIT "$torchrun" 2>/dev/null || true
  fi
}
trap 'pass_on TERM 15' TERM HUP
trap 'pass_on INT 2' INT
trap 'pass_on USR1 10' USR1
code=0
while true; do # wait returns for every signal that is passed on
  wait "$torchrun" && code=0 || code=$?
  kill -0 "$torchrun" 2>/dev/null || break
  sleep 0.1
done
if [ -s "$MEGARESNORM_LAUNCHER/end" ]; then
  code=$(cat "$MEGARESNORM_LAUNCHER/end")
elif [ "$quit" = 1 ]; then
  code=$stop
fi
exit "$code"
