#!/usr/bin/env bash
# bash scripts/benchmark.sh DATASET [CONFIG] [KEY VALUE ...]: every method in one table.
# Environment: DATA, OUTPUT, SEEDS. The rows are in configs/experiments/benchmark.yaml.
exec "$(command -v python || command -v python3)" "$(dirname "$0")/run.py" --experiment benchmark "$@"
