#!/bin/bash
# Ends the SLURM that `up.sh DIR` started, and its jobs.
set -u
DIR=$(realpath "$1")
export SLURM_CONF="$DIR/slurm.conf"
scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null
scancel --user="$(id -un)" 2>/dev/null
sleep 1
for file in "$DIR"/slurmd.pid "$DIR"/slurmctld.pid "$DIR"/munge/munged.pid; do
  [ -f "$file" ] && kill "$(cat "$file")"
  for _ in $(seq 100); do
    [ -f "$file" ] || break # its last act
    sleep 0.1
  done
done
exit 0
