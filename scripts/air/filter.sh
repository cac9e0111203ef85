#!/usr/bin/env bash
# bash scripts/air/filter.sh DATASET [CONFIG] [KEY VALUE ...]: the filter of synthetic images.
# Environment: DATA, OUTPUT, SEEDS. The rows are in configs/experiments/filter.yaml.
exec "$(command -v python || command -v python3)" "$(dirname "$0")/../run.py" --experiment filter "$@"
