#!/usr/bin/env bash
# From a fresh clone to a trained 100-sub-layer language model: environment, real text, training, a sample.
# Run it again: the environment, the data and the finished run are reused. Arguments are overrides of the recipe:
#   bash launch/quickstart.sh model.topology=keel train.output=runs/quickstart/keel-50
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
help_if_asked "$@"

started=$SECONDS
make_environment ""

say "preparing text: the sources of Python's own library"
"${MEGARESNORM[@]}" prepare --corpus stdlib --tokenizer sentencepiece --vocab-size 1024 --out runs/quickstart/data

output=runs/quickstart/deepnorm-50 # where the run is, unless an override says otherwise
for override in "$@"; do
  case "$override" in train.output=*) output=${override#train.output=} ;; esac
done
load=$(cut -d. -f1 /proc/loadavg 2>/dev/null || echo 0)
[ "$load" -lt "$(nproc 2>/dev/null || echo 1)" ] || [ -n "${OMP_NUM_THREADS:-}" ] \
  || say "other programs use this machine, and threads would wait for them: OMP_NUM_THREADS=1 may be faster"
say "training configs/quickstart.yaml"
"${MEGARESNORM[@]}" train configs/quickstart.yaml "$@"

activate="" command=${MEGARESNORM[*]} run="$VENV/bin/python -m"
if [ ${#MEGARESNORM[@]} -eq 1 ]; then # installed there
  activate="
    activate: source $VENV/bin/activate"
  command=megaresnorm run="python -m"
fi
say "done in $((SECONDS - started)) s; then${activate}
    curves:   $run tensorboard.main --logdir $output
    report:   $run pip install -q -c constraints.txt matplotlib
              $command report $output
    go on:    bash launch/quickstart.sh ${*:+$* }train.steps=2000
    write:    $command generate $output --prompt 'import os' --top-p 0.95
    export:   $run pip install -q -c constraints.txt transformers
              $command convert to-hf $output $output-hf
    compare:  bash launch/quickstart.sh model.topology=keel train.output=runs/quickstart/keel-50
    probe:    $command depth --probe --topologies post,deepnorm,keel"
