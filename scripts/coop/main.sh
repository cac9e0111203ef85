#!/usr/bin/env bash
# bash scripts/coop/main.sh DATASET CONFIG CTP NCTX SHOTS CSC [KEY VALUE ...]: CoOp's own six arguments.
# CTP: end, middle or front; NCTX: context tokens; SHOTS: labelled images a class; CSC: True or False.
# Environment: DATA, OUTPUT, SEEDS. CONFIG: mini, vit_b32, ...; see scripts/run.py.
exec "$(command -v python || command -v python3)" "$(dirname "$0")/../run.py" --trainers CoOp --coop-arguments "$@"
