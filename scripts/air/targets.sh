#!/usr/bin/env bash
# bash scripts/air/targets.sh [CONFIG] [KEY VALUE ...]: the preset plus on other kinds of target.
# Environment: TARGETS (data sets; one after another, a table for each), DATA, OUTPUT, SEEDS.
# The rows are in configs/experiments/targets.yaml.
run() { "$(command -v python || command -v python3)" "$(dirname "$0")/../run.py" --experiment targets "$@"; }
case "${1-}" in -*) run "$@"; exit ;; esac
for target in ${TARGETS:-digits_inverted digits_rotated digits_noisy}; do
    run "$target" "$@" || exit
done
