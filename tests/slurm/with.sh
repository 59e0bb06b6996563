#!/bin/bash
# `with.sh COMMAND ...` runs a command with a SLURM on this machine, installed where it can be, and takes it down again.
set -euo pipefail
HERE=$(dirname "$(realpath "$0")")
for program in slurmctld slurmd sbatch munged; do
  if ! command -v "$program" >/dev/null; then
    apt-get update --quiet=2
    apt-get install --yes --quiet=2 --no-install-recommends slurmctld slurmd slurm-client munge
    break
  fi
done
DIR=$(mktemp -d /tmp/simsearch-slurm-XXXXXX)
trap '"$HERE/down.sh" "$DIR"; rm -rf "$DIR"' EXIT
eval "$("$HERE/up.sh" "$DIR")"
"$@"
