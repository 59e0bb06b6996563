"""The default head under every CIFAR-10 protocol, as float descriptors and as 48-bit codes: protocols.csv.

python protocols.py
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

from simsearch import results

METRICS = ("mAP", "P@1", "P@10", "R@10", "mAP_pessimistic", "mAP_optimistic", "mAP_index_order")
PROTOCOLS = ("dsh-release", "10k-50k", "1k-54k", "1k-59k", *(f"unseen-classes protocol.fold={i}" for i in range(3)))
ROWS = {"frozen-lite0@128-average-128d": "", "frozen-lite0@128-average-itq-48bit": "model=frozen-itq"}


def main() -> None:
    lines = []
    for protocol in PROTOCOLS:
        for row, overrides in ROWS.items():
            command = f"simsearch train data=cifar10 protocol={protocol} {overrides}".strip()
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                quiet = [f"run_dir={folder}/run", "logger.mode=disabled", "catalog.write=false"]
                subprocess.run([sys.executable, "-m", *shlex.split(command), *quiet], check=True)
                about = json.loads(Path(folder, "run/metrics.json").read_text())["test"]
            seconds = time.perf_counter() - start
            lines += results.result_lines(
                about, METRICS, row=row, data="cifar10", seconds=seconds, seed=0, command=command
            )
    with (Path(__file__).parent / "protocols.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([results.RESULT_COLUMNS, *lines])


if __name__ == "__main__":
    main()
