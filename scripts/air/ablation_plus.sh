#!/usr/bin/env bash
# bash scripts/air/ablation_plus.sh DATASET [CONFIG] [KEY VALUE ...]: what each part beyond the paper adds.
# Environment: DATA, OUTPUT, SEEDS. The rows are in configs/experiments/ablation_plus.yaml.
exec "$(command -v python || command -v python3)" "$(dirname "$0")/../run.py" --experiment ablation_plus "$@"
