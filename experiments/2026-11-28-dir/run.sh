#!/usr/bin/env bash
# All rows of this study, seed by seed, so that a stopped call has whole seeds: run.sh <folder of the runs> [seeds].
# A second call finds finished runs and goes on with a stopped one. Needs outputs/art for the rows of paintings.
set -u
root=${1:?give the folder of the runs}
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" WANDB_MODE="${WANDB_MODE:-disabled}"
for seed in ${2:-0 1 2}; do
  "${PYTHON:-python3}" -m simsearch reproduce rows="$here/rows.yaml" row="${ROW:-all}" "seeds=[$seed]" run_root="$root"
done
