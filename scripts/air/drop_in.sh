#!/usr/bin/env bash
# bash scripts/air/drop_in.sh DATASET [CONFIG] [KEY VALUE ...]: CoOp beside CoOp with the auxiliary classifier.
# Environment: DATA, OUTPUT, SEEDS. The rows are in configs/experiments/drop_in.yaml.
exec "$(command -v python || command -v python3)" "$(dirname "$0")/../run.py" --experiment drop_in "$@"
