#!/usr/bin/env bash
# Everything that wants an accelerator, in minutes: README.md beside this says what. On a CPU: run.sh --small
set -u
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" "$here/run.py" "$@"
