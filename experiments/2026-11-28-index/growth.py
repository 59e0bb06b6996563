"""How the chosen index grows with the number of items, and what a billion would take: growth.csv and growth.png.

    python growth.py                    from scale.csv

Of each quantity the line through the first two numbers of items, in logarithms of both, says what the third should be;
the share by which the third differs from it is `error`. A billion is that line too. The bytes of the lists' centres are
in the size of the file.
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
NAMES = {
    "bytes": "bytes of the file",
    "build_cpu_s": "processor seconds to build",
    "cpu_ms_alone": "processor ms of a query alone",
    "cpu_ms_batch": "processor ms of a query of 500",
    "anon_mib": "MiB in memory, mapped (anonymous)",
}
FAR = 1_000_000_000


def main() -> None:
    with (HERE / "scale.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "auto"]
    points: dict[int, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: int(row["mapped"])):
        items = int(row["items"])
        found = points.setdefault(items, {})
        found["bytes"] = items * float(row["bytes_per_item"])
        found["build_cpu_s"], found["cpu_ms_alone"] = float(row["build_cpu_s"]), float(row["cpu_ms_alone"])
        found["cpu_ms_batch"], found["anon_mib"] = 1e3 / float(row["cpu_qps"]), float(row["anon_mib"])
        found["recall"] = float(row["recall"])
    sizes = sorted(points)
    table = []
    figure, axes = plt.subplots(1, len(NAMES), figsize=(3.1 * len(NAMES), 3))
    for axis, (name, title) in zip(axes, NAMES.items(), strict=True):
        y = np.log10([points[n][name] for n in sizes])
        slope = (y[1] - y[0]) / (np.log10(sizes[1]) - np.log10(sizes[0]))

        def line(n: float, y=y, slope=slope) -> float:
            return float(10 ** (y[1] + slope * (np.log10(n) - np.log10(sizes[1]))))

        row = {"quantity": name, "power": slope} | {f"{n:.0e}": points[n][name] for n in sizes}
        for n in sizes[2:]:
            row |= {f"expected_{n:.0e}": line(n), "error": points[n][name] / line(n) - 1}
        table.append(row | {f"model_{FAR:.0e}": line(FAR)})
        axis.loglog([sizes[0], FAR], [line(sizes[0]), line(FAR)], ":", color="grey")
        axis.loglog(sizes[:2], [points[n][name] for n in sizes[:2]], "o", color="C0")
        axis.loglog(sizes[2:], [points[n][name] for n in sizes[2:]], "s", color="C3")
        axis.set_title(f"{title}\n~ N^{slope:.2f}", fontsize=9)
        axis.set_xlabel("items")
    figure.tight_layout()
    figure.savefig(HERE / "growth.png", dpi=110)
    with (HERE / "growth.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in table for k in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in table)
    print(*table, sep="\n")


if __name__ == "__main__":
    main()
