#!/usr/bin/env bash
# bash scripts/air/sweep_m.sh DATASET [CONFIG] [KEY VALUE ...]: accuracy against the number M of images a class.
# Environment: DATA, OUTPUT, SEEDS. The rows are in configs/experiments/sweep_m.yaml.
exec "$(command -v python || command -v python3)" "$(dirname "$0")/../run.py" --experiment sweep_m "$@"
