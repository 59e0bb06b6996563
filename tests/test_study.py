"""Mathematics and bookkeeping of the study of trained networks. Studies may be deleted: then this skips."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from simsearch import configs

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
