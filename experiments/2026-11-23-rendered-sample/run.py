"""The embedded sample by style, artist and work: trains once a protocol, gathers results.csv and the picture.

python run.py
"""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from simsearch import results

HERE = Path(__file__).parent
METRICS = ("mAP", "P@1", "P@10", "R@10", "index/recall@10", "mAP_pessimistic", "mAP_optimistic")
ROWS = {
    "frozen-lite0-average-128d": "",
    "frozen-lite0-average-itq-48bit": "model=frozen-itq",
}


def main() -> None:
    lines = []
    for protocol in ("rendered-style", "rendered-artist", "rendered-work"):
        for row, overrides in ROWS.items():
            command = f"simsearch train protocol={protocol} {overrides}".strip()
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                arguments = [*shlex.split(command)[1:], f"run_dir={folder}/run", "logger.mode=disabled"]
                subprocess.run([sys.executable, "-m", "simsearch", *arguments], check=True)
                seconds = time.perf_counter() - start
                about = json.loads(Path(folder, "run/metrics.json").read_text())["test"]
                if protocol == "rendered-artist" and not overrides:
                    with Image.open(Path(folder, "run/figures/neighbours.png")) as picture:
                        picture.quantize(256).save(HERE / "neighbours.png", optimize=True)
            lines += results.result_lines(
                about, METRICS, row=row, data="rendered", seconds=seconds, seed=0, command=command
            )
    with (HERE / "results.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([results.RESULT_COLUMNS, *lines])


if __name__ == "__main__":
    main()
