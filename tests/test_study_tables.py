"""Results, paired tests and tables of a study, from the folders of its measurements."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from simsearch.results import RESULT_COLUMNS
from simsearch.studies.tables import PAIRED_COLUMNS, Measurement, markdown_tables, paired_lines, result_lines

QUERIES = 50


def measurement(folder: Path, row: str, seed: int, values: np.ndarray, *, change: str = "", prefix: str = ""):
    folder.mkdir(parents=True)
    metrics = {f"{prefix}mAP": values.mean(), f"{prefix}P@1": 0.5, "queries": QUERIES, "bytes_per_item": 6}
    stage = {"protocol": "10k-50k", "fingerprint": "f" * 16, "metrics": metrics, "unit": "query", "units": QUERIES}
    stage["intervals"] = {f"{prefix}mAP": [values.mean() - 0.1, values.mean() + 0.1]}
    (folder / "metrics.json").write_text(json.dumps({"test": stage}))
    shuffled = np.random.default_rng(seed).permutation(QUERIES)
    columns = {f"{prefix}AP": values[shuffled], f"{prefix}P@1": np.full(QUERIES, 0.5)}
    table = pa.table({"index": shuffled + 100, "unit": shuffled} | columns)
    pq.write_table(table, folder / "per_query.parquet")
    return Measurement(row, change, seed, folder, (f"{prefix}mAP", f"{prefix}P@1"), "cifar10", 60.0 + 60 * seed)


@pytest.fixture
def measured(tmp_path):
    """Row "a" with two seeds, "b" with three; "b" also re-ranked, its first seed; a row under another fingerprint."""
    draw = np.random.default_rng(0).random
    a, b = draw((2, QUERIES)), draw((3, QUERIES)) + 0.5
    found = [measurement(tmp_path / f"a{seed}", "a", seed, values) for seed, values in enumerate(a)]
    found += [measurement(tmp_path / f"b{seed}", "b", seed, values) for seed, values in enumerate(b)]
    found.append(measurement(tmp_path / "r", "b", 0, b[0] + 0.1, change="rerank=aqe", prefix="rerank/"))
    found.append(measurement(tmp_path / "c", "c", 0, draw(QUERIES)))
    other = json.loads((tmp_path / "c/metrics.json").read_text())
    other["test"]["fingerprint"] = "e" * 16
    (tmp_path / "c/metrics.json").write_text(json.dumps(other))
    return found, a, b


def test_paired_lines_take_means_over_the_seeds_that_both_have(measured):
    found, a, b = measured
    lines = [dict(zip(PAIRED_COLUMNS, line, strict=True)) for line in paired_lines(found)]
    assert {(line["row_a"], line["row_b"]) for line in lines} == {("b", "a"), ("b+aqe", "b")}
    first, second = (next(x for x in lines if x["row_a"] == row and x["metric"] == "mAP") for row in ("b", "b+aqe"))
    wanted = b[:2].mean(0) - a.mean(0)
    assert first["difference"] == pytest.approx(wanted.mean(), abs=1e-12)
    assert first["seeds"] == "0 1"
    interval = stats.t.interval(0.95, QUERIES - 1, wanted.mean(), stats.sem(wanted))
    assert (first["low"], first["high"]) == pytest.approx(interval, abs=1e-6)
    assert second["difference"] == pytest.approx(0.1, abs=1e-12)
    assert second["seeds"] == "0"
    assert all(line["queries"] == line["units"] == QUERIES for line in lines)
    assert all(line["p_holm"] >= line["p"] for line in lines)
    ps = sorted(line["p"] for line in lines)
    assert min(line["p_holm"] for line in lines) == pytest.approx(min(1, len(lines) * ps[0]))


def test_many_tests_draw_patterns_enough_for_their_correction(measured, monkeypatch):
    monkeypatch.setattr("simsearch.studies.tables.RESAMPLES", 80)  # enough for four tests
    assert min(line[PAIRED_COLUMNS.index("p")] for line in paired_lines(measured[0])) == 1 / 81
    monkeypatch.setattr("simsearch.studies.tables.RESAMPLES", 79)
    assert min(line[PAIRED_COLUMNS.index("p_holm")] for line in paired_lines(measured[0])) < 0.05 / 2


def test_what_one_of_two_rows_lacks_is_not_paired(measured, tmp_path):
    """Cut-offs are a setting: an evaluation with ks=[5] has no P@1."""
    found, _, _ = measured
    table = pq.read_table(tmp_path / "b1/per_query.parquet")
    pq.write_table(table.drop_columns(["P@1"]), tmp_path / "b1/per_query.parquet")
    lines = [dict(zip(PAIRED_COLUMNS, line, strict=True)) for line in paired_lines(found)]
    assert {(x["row_a"], x["row_b"], x["metric"]) for x in lines} == {
        *(("b", "a", "mAP"), ("b+aqe", "b", "mAP"), ("b+aqe", "b", "P@1"))
    }


def test_measurements_of_other_queries_are_not_paired(measured, tmp_path):
    found, _, _ = measured
    table = pq.read_table(tmp_path / "b0/per_query.parquet")
    pq.write_table(table.set_column(0, "index", pa.array(np.arange(QUERIES))), tmp_path / "b0/per_query.parquet")
    with pytest.raises(ValueError, match="b and a have other queries under 10k-50k"):
        paired_lines(found)


def test_measurements_over_other_units_are_not_paired(measured, tmp_path):
    found, _, _ = measured
    for name in ("a0", "a1"):
        path = tmp_path / name / "metrics.json"
        about = json.loads(path.read_text())
        about["test"] |= {"unit": "artist", "units": 10}
        path.write_text(json.dumps(about))
    lines = [dict(zip(PAIRED_COLUMNS, line, strict=True)) for line in paired_lines(found)]
    assert {(line["row_a"], line["row_b"], line["unit"]) for line in lines} == {("b+aqe", "b", "query")}


def test_tables_show_means_spreads_and_intervals(measured, tmp_path):
    found, _, b = measured
    path = tmp_path / "results.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([RESULT_COLUMNS, *result_lines(found)])
    with path.open(newline="") as file:
        text = markdown_tables(csv.DictReader(file))
    assert text.count("| row | seeds | mAP | P@1 | minutes |") == 2  # a table for each fingerprint
    (row,) = [line for line in text.splitlines() if line.startswith("| b |")]
    means = b.mean(1)
    cells = f"{means.mean():.4f} ± {np.std(means, ddof=1):.4f} [{means.mean() - 0.1:.4f}, {means.mean() + 0.1:.4f}]"
    assert row == f"| b | 3 | {cells} | 0.5000 ± 0.0000 | 2 |"
    (row,) = [line for line in text.splitlines() if line.startswith("| b+aqe |")]
    assert f"| 1 | {b[0].mean() + 0.1:.4f} [" in row
    assert result_lines(found, ("P@1",))[0][4:6] == ["P@1", 0.5]


def test_intervals_over_different_units_are_not_averaged(measured, tmp_path):
    """One seed of b was measured before artists were the sampling unit; one of a has no interval."""
    found, a, b = measured
    path = tmp_path / "b0/metrics.json"
    path.write_text(path.read_text().replace('"unit": "query", "units": 50', '"unit": "artist", "units": 9'))
    path = tmp_path / "a1/metrics.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({"test": about["test"] | {"intervals": {}}}))
    lines = [dict(zip(RESULT_COLUMNS, map(str, line), strict=True)) for line in result_lines(found)]
    text = markdown_tables(lines)
    for row, values in (("a", a), ("b", b)):
        means = values.mean(1)
        assert f"| {row} | {len(means)} | {means.mean():.4f} ± {np.std(means, ddof=1):.4f} | 0.5000" in text
    assert f"| b+aqe | 1 | {b[0].mean() + 0.1:.4f} [" in text
    (line,) = [line for line in text.splitlines() if line.startswith("No interval")]
    assert line == "No interval, as seeds were measured over different sampling units: b mAP (artist, query)"


def test_labels_tell_changes_of_equal_values_apart(tmp_path):
    changes = ["rerank=alpha-qe rerank.k=3", "rerank=alpha-qe rerank.alpha=3", "rerank=alpha-qe rerank.alpha=0.5", ""]
    labels = [Measurement("b", change, 0, tmp_path, (), "cifar10", 0.0).label for change in changes]
    assert labels == ["b+alpha-qe+k=3", "b+alpha-qe+alpha=3", "b+alpha-qe+alpha=0.5", "b"]


def test_a_row_before_and_after_re_ranking_has_both_values(tmp_path):
    """Metrics before and after are not averaged, and the paired test is of what the row expects first."""
    plain, refined = np.random.default_rng(0).random((2, QUERIES))
    m = measurement(tmp_path / "m", "m", 0, refined, change="rerank=aqe", prefix="rerank/")
    stage = json.loads((tmp_path / "m/metrics.json").read_text())
    stage["test"]["metrics"]["mAP"] = plain.mean()
    (tmp_path / "m/metrics.json").write_text(json.dumps(stage))
    table = pq.read_table(tmp_path / "m/per_query.parquet")
    order = table["index"].to_numpy() - 100
    pq.write_table(table.append_column("AP", pa.array(plain[order])), tmp_path / "m/per_query.parquet")
    both = replace(m, metrics=("mAP", "rerank/mAP"))
    with (tmp_path / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([RESULT_COLUMNS, *result_lines([both])])
    with (tmp_path / "results.csv").open(newline="") as file:
        text = markdown_tables(csv.DictReader(file))
    assert "| row | seeds | mAP | rerank/mAP | minutes |" in text
    assert f"| m+aqe | 1 | {plain.mean():.4f} | {refined.mean():.4f} [" in text
    other = measurement(tmp_path / "n", "n", 0, plain - 0.25, change="rerank=aqe", prefix="rerank/")
    (line, *_) = [dict(zip(PAIRED_COLUMNS, found, strict=True)) for found in paired_lines([other, both])]
    assert line["difference"] == pytest.approx(0.25)
