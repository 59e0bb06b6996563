"""The embedded sample by style, artist and work: trains once a protocol, gathers results.csv and the picture.

python run.py
"""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
HEADER = "row,data,protocol,fingerprint,metric,value,ci_low,ci_high,queries,bytes_per_item,seconds,seed,command"
METRICS = ("mAP", "P@1", "P@10", "R@10", "index/recall@10", "mAP_pessimistic", "mAP_optimistic")
ROWS = {
    "frozen-lite0-average-128d": "",
    "frozen-lite0-average-itq-48bit": "model=frozen-itq index=binary-flat",
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
                    shutil.copy(Path(folder, "run/figures/neighbours.png"), HERE / "neighbours.png")
            values = about["metrics"]
            for metric in METRICS:
                if metric in values:
                    low, high = about["intervals"].get(metric, ("", ""))
                    head = [row, "rendered", about["protocol"], about["fingerprint"], metric, values[metric], low, high]
                    tail = [int(values["queries"]), int(values["bytes_per_item"]), round(seconds, 1), 0, command]
                    lines.append([*head, *tail])
    with (HERE / "results.csv").open("w", newline="") as file:
        file.write(HEADER + "\n")
        csv.writer(file).writerows(lines)


if __name__ == "__main__":
    main()
