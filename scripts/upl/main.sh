#!/usr/bin/env bash
# bash scripts/upl/main.sh DATASET [CONFIG] [KEY VALUE ...]; environment: DATA, OUTPUT, SEEDS. See scripts/run.py.
# CONFIG is the name of a file in configs/trainers/UPL.
exec "$(command -v python || command -v python3)" "$(dirname "$0")/../run.py" --trainers UPL "$@"
