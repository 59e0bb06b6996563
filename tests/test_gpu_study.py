"""The study that wants an accelerator, scaled down on a CPU. Studies may be deleted: then this skips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from simsearch import configs

FOLDER = Path(configs.CONF).parent / "experiments/2026-11-28-gpu"


@pytest.mark.slow
def test_all_parts_run_and_leave_what_they_found(tmp_path):
    if not FOLDER.is_dir():
        pytest.skip(f"{FOLDER.name} is not there")
    out = tmp_path / "out"
    env = os.environ | {"OUT": str(out), "WORK": str(tmp_path / "work"), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(FOLDER / "run.sh"), "--small", "--seconds", "900"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = (out / "log.txt").read_text()
    parts = ("tests", "dsh-12-0-steps", "dsh-12-0-10k-50k", "dsh-24-0-release", "hashing-0", "evaluation", "throughput")
    assert all(f"{part}: ok" in said for part in parts), said
    assert "not ok: nothing" in said
    names = set()
    for archive in out.glob("*.tar.gz"):
        with tarfile.open(archive) as tar:
            names |= set(tar.getnames())
    runs = {"dsh-12-0", "dsh-24-0", "hashing-0"}
    assert {f"{run}/checkpoints/best.ckpt" for run in runs} <= names
    assert {"hashing-0/metrics.json", "dsh-12-0-release/metrics.json", "dsh-24-0-10k-50k/metrics.json"} <= names
    steps = json.loads((tmp_path / "work" / "dsh-12-0.json").read_text())
    assert steps["steps"] == 6
    first, *_, last = (row.split(" | ") for row in (out / "summary.md").read_text().splitlines() if "dsh-12-0-" in row)
    assert first[1] == last[1] == "6"
    report = json.loads((tmp_path / "work" / "evaluation.json").read_text())
    assert report["equal ranks and counts from equal codes on the device"]
    assert report["float32"]["bits that differ"] == 0  # here the device is the CPU
    assert len(list(out.iterdir())) <= 8
