#!/usr/bin/env bash
# bash scripts/cpl/main.sh DATASET [CONFIG] [KEY VALUE ...]; environment: DATA, OUTPUT, SEEDS. See scripts/run.py.
# CONFIG is the name of a file in configs/trainers/CPL.
exec "$(command -v python || command -v python3)" "$(dirname "$0")/../run.py" --trainers CPL "$@"
