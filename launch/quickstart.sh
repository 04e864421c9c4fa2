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

say "training configs/quickstart.yaml"
"${MEGARESNORM[@]}" train configs/quickstart.yaml "$@"

say "done in $((SECONDS - started)) s
    curves:   $VENV/bin/python -m tensorboard.main --logdir runs/quickstart
    go on:    bash launch/quickstart.sh train.steps=2000
    write:    ${MEGARESNORM[*]} generate runs/quickstart/deepnorm-50 --prompt 'import os' --top-p 0.95
    export:   $VENV/bin/python -m pip install -q -c constraints.txt transformers
              ${MEGARESNORM[*]} convert to-hf runs/quickstart/deepnorm-50 runs/quickstart/hf
    compare:  bash launch/quickstart.sh model.topology=keel train.output=runs/quickstart/keel-50
    probe:    ${MEGARESNORM[*]} depth --probe --topologies post,deepnorm,keel"
