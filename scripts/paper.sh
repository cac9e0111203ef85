#!/usr/bin/env bash
# bash scripts/paper.sh DATASET [CONFIG] [KEY VALUE ...]: the paper's grid, a table for each of three paradigms.
# CONFIG with a ViT: mini_vit (of digits the default here), vit_b32, ...; without one, rows with visual prompts are left out.
# Environment: DATA, OUTPUT, SEEDS.
# The rows are in configs/experiments/paper.yaml.
exec "$(command -v python || command -v python3)" "$(dirname "$0")/run.py" --experiment paper "$@"
