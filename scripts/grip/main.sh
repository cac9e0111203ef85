#!/usr/bin/env bash
# bash scripts/grip/main.sh DATASET [CONFIG] [KEY VALUE ...]; environment: DATA, OUTPUT, SEEDS. See scripts/run.py.
# CONFIG: mini, vit_b32, vit_b32+sdxl, ... Completed runs are skipped; interrupted runs resume.
exec "$(command -v python || command -v python3)" "$(dirname "$0")/../run.py" --trainers GRIP "$@"
