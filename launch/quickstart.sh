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
"$VENV/bin/megaresnorm" prepare --corpus stdlib --tokenizer sentencepiece --vocab-size 1024 --out runs/quickstart/data

say "training configs/quickstart.yaml"
"$VENV/bin/megaresnorm" train configs/quickstart.yaml "$@"

say "done in $((SECONDS - started)) s
    curves:   $VENV/bin/tensorboard --logdir runs/quickstart
    go on:    bash launch/quickstart.sh train.steps=2000
    write:    $VENV/bin/megaresnorm generate runs/quickstart/deepnorm-50 --prompt 'import os' --top-p 0.95
    export:   $VENV/bin/pip install -q 'transformers>=5.0' && $VENV/bin/megaresnorm convert to-hf runs/quickstart/deepnorm-50 runs/quickstart/hf
    compare:  bash launch/quickstart.sh model.topology=keel train.output=runs/quickstart/keel-50
    probe:    $VENV/bin/megaresnorm depth --probe --topologies post,deepnorm,keel"
