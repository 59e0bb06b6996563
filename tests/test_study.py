"""Mathematics and bookkeeping of the study of trained networks. Studies may be deleted: then this skips."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from simsearch import configs
from simsearch.functional.significance import paired_permutation

PATH = Path(configs.CONF).parent / "experiments/2026-11-23-cifar10-trained/study.py"


@pytest.fixture(scope="module")
def study():
    if not PATH.is_file():
        pytest.skip(f"{PATH.parent.name} is not there")
    spec = importlib.util.spec_from_file_location("trained_study", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def measurement(study, folder, row, values, **metrics):
    folder.mkdir(parents=True)
    n = len(values)
    stage = {"protocol": "10k-50k", "fingerprint": "f" * 16, "intervals": {"mAP": [0.1, 0.9]}}
    stage["metrics"] = {"mAP": float(values.mean()), "queries": n, "bytes_per_item": 6, **metrics}
    (folder / "metrics.json").write_text(json.dumps({"test": stage}))
    shuffled = torch.randperm(n)
    column = "rerank/AP" if metrics else "AP"
    pq.write_table(
        pa.table({"index": shuffled.numpy(), column: values[shuffled].numpy()}), folder / "per_query.parquet"
    )
    return study.Measurement(row, 0, folder, 60.0)


def test_paired_lines_compare_the_same_queries_and_correct_for_all_tests(study, tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(50, dtype=torch.float64, generator=generator)
    noise = 0.02 * torch.rand(50, dtype=torch.float64, generator=generator)
    measured = [
        measurement(study, tmp_path / "a", "frozen-x-128d", base),
        measurement(study, tmp_path / "b", "dir-x-128d", base + noise),
        measurement(study, tmp_path / "c", "dir-x-128d+aqe", base + 0.5 * noise, **{"rerank/mAP": 0.5}),
    ]
    lines = [dict(zip(study.PAIRED_COLUMNS, line, strict=True)) for line in study.paired(measured)]
    pairs = {(line["row_a"], line["row_b"]) for line in lines}
    assert pairs == {("dir-x-128d", "frozen-x-128d"), ("dir-x-128d+aqe", "dir-x-128d")}
    for line in lines:
        expected = float(noise.mean()) * (0.5 * -1 if "+" in line["row_a"] else 1)
        assert line["difference"] == pytest.approx(expected, abs=1e-12)
        assert line["low"] <= line["difference"] <= line["high"]
        assert line["p_holm"] == pytest.approx(min(1, 2 * line["p"]))
    assert lines[0]["p"] == paired_permutation(base + noise, base, resamples=study.RESAMPLES)


def test_tables_from_results(study):
    def line(row, seed, value, metric="mAP_index_order", protocol="dsh-release"):
        return {"row": row, "protocol": protocol, "metric": metric, "value": str(value), "ci_low": str(value - 0.01),
                "ci_high": str(value + 0.01), "bytes_per_item": "2", "seconds": "120", "seed": str(seed)}  # fmt: skip

    lines = [line("dsh-paper-12bit", seed, value) for seed, value in enumerate((0.60, 0.62, 0.64))]
    lines += [line(f"hash-a-48bit-unseen{i}", 0, 0.3 * i, "mAP", f"unseen-classes/{i}") for i in range(3)]
    lines.append(line("hash-a-48bit", 0, 0.9, "mAP", "10k-50k"))
    values = study.read_values(lines)
    (row,) = [r for r in study.dsh_table(values).splitlines() if r.startswith("| 12 |")]
    assert "| 0.6157 | 0.6200 ± 0.0200 (3 seeds) | +0.0043 |" in row
    (row,) = [r for r in study.objectives_table(values).splitlines() if r.startswith("| hash-a-48bit |")]
    assert "| 0.9000 [0.8900, 0.9100] |" in row
    assert "| 0.3000 | 2 |" in row
    assert study.spread_out([0.0, 0.0, 1.0], 0.5) == pytest.approx([-1 / 6, 1 / 3, 5 / 6])
