#!/usr/bin/env bash
# Builds the wheel from the source distribution, installs it into a fresh environment and runs the sample in small from
# a folder outside the checkout: tests/wheel.sh [python of the environment that has the dependencies]
# The dependencies are those of that environment, by a path file: a second copy would take 6 GB and minutes and would
# test pip, not the wheel. Its own simsearch is hidden, as the path file brings in no path files of that environment.
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
python=$(realpath -s "${1:-.venv/bin/python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export SIMSEARCH_CACHE=$work/cache WANDB_MODE=offline HF_HUB_OFFLINE=1

"$python" -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { tail -n 30 "$work/build.log"; exit 1; }
"$python" -m venv "$work/venv"
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/dependencies.pth"
"$work/venv/bin/python" -m pip install --quiet --no-deps --no-index "$work"/dist/*.whl
mkdir "$work/elsewhere"
cd "$work/elsewhere"
"$work/venv/bin/python" - "$site" "$checkout" <<'EOF'
import sys
from importlib import metadata
from pathlib import Path

import simsearch
from simsearch import usage

site, checkout = sys.argv[1:]
assert Path(simsearch.__file__).is_relative_to(site), simsearch.__file__
assert usage.CONF.is_relative_to(site), usage.CONF
assert metadata.version("simsearch") == simsearch.__version__
assert Path(site, "simsearch", "py.typed").is_file()
there, here = ({str(p.relative_to(d)) for p in d.rglob("*.yaml")} for d in (usage.CONF, Path(checkout, "conf")))
assert there == here and here, there ^ here
EOF
run() {
  echo "\$ simsearch $*"
  "$work/venv/bin/simsearch" "$@"
}
run train data.styles=2 data.artists=4 data.works=3 data.size=48 backbone.size=32 model.whitening.dimension=8 \
  logger.mode=disabled run_dir=run
run data export data.styles=2 data.artists=4 data.works=3 data.size=48 out=images limit=20
run index run=run images=images out=catalog
first=$(find images -name '*.png' | sort | head -n 1)
run search catalog=catalog image="$first" k=3
run recommend catalog=catalog image="$first" k=3
"$work/venv/bin/python" - "$first" <<'EOF'
import sys

import torch

import simsearch

answer = simsearch.open_catalog("catalog").search(sys.argv[1], k=3)
assert answer.hits[0].score > 0.99, answer
encoder = simsearch.load_encoder("run")
vectors = encoder.describe([sys.argv[1]])
assert vectors.shape == (1, 8), vectors.shape
report = simsearch.evaluate(torch.eye(3), [0, 1, 2], torch.eye(3), [0, 1, 2])
assert report["mAP"] == 1, report
assert simsearch.build_catalog(encoder, "images", "again").search(sys.argv[1], k=1).hits[0].score > 0.99
EOF
if run reproduce list=true; then
  echo "reproduce found studies where there is no checkout" >&2
  exit 1
fi
echo "the wheel works"
