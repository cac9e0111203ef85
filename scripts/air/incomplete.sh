#!/usr/bin/env bash
# bash scripts/air/incomplete.sh DATASET [CONFIG] [KEY VALUE ...]: unlabelled sets that lack classes or are unbalanced.
# Environment: DATA, OUTPUT, SEEDS. The rows are in configs/experiments/incomplete.yaml.
exec "$(command -v python || command -v python3)" "$(dirname "$0")/../run.py" --experiment incomplete "$@"
