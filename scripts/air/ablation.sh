#!/usr/bin/env bash
# bash scripts/air/ablation.sh DATASET [CONFIG] [KEY VALUE ...]: what each part of AiR adds.
# Environment: DATA, OUTPUT, SEEDS. The rows are in configs/experiments/ablation.yaml.
exec "$(command -v python || command -v python3)" "$(dirname "$0")/../run.py" --experiment ablation "$@"
