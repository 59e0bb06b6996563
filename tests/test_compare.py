"""`simsearch compare`: small made-up run directories whose every number is known."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import statistics
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from scipy import stats

from simsearch import configs, tracking
from simsearch.commands import compare
from simsearch.comparison import charts, page, regressions
from simsearch.comparison.leaderboard import check_comparable, config_differences, leaderboard
from simsearch.comparison.report import columns, csv_text, duration, markdown_table, terminal_table
from simsearch.comparison.runs import Missing, _natural, expand, read_all, read_wandb, short_names
from simsearch.comparison.selection import configuration, find_baseline, without_repeats
from simsearch.data.collection import Collection
from simsearch.files import read_json, write_json
from simsearch.functional.significance import holm, mean_interval, paired_interval, paired_permutation
from simsearch.identity import measurement_identity
from simsearch.images import encode_thumbnail
from simsearch.index.faiss_index import FaissIndex
from simsearch.models.encoder import build_encoder
from simsearch.search.describe import encode
from simsearch.search.item_tables import item_table
from simsearch.search.writing import write_catalog
from tests.conftest import simsearch

Q, N, CLASSES = 60, 100, ("ant", "bee", "<b>cow</b>")
NETWORK = {
    "_target_": "simsearch.models.hashing.HashNetwork",
    "backbone": {"_target_": "simsearch.models.cifar.cifar_backbone", "width": 24, "size": 32, "weights": "random"},
    "pooling": {"_target_": "simsearch.models.pooling.MAC"},
    "bits": 16,
}


@pytest.fixture(scope="module")
def collection() -> Collection:
    """100 small images of three classes; the last 60 are queries, the first 40 and all queries the gallery."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.stack([torch.arange(N) % 3, torch.arange(N) // 2], dim=1)
    groups = tuple(str(i) for i in range(N // 2))
    return Collection("toy", images, labels, ("kind", "pair"), (CLASSES, groups), torch.arange(N) >= N - Q)


def values(seed: int, shift: float = 0.0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 0.05, Q)
    return np.clip(0.5 + 0.3 * np.sin(np.arange(Q)) + noise + shift, 0, 1)


def make_run(
    folder: Path,
    ap: np.ndarray,
    *,
    seed: int = 0,
    lr: float = 0.1,
    fingerprint: str = "feed",
    start: str | None = None,
    found: list[list[int]] | None = None,
    facts: dict | None = None,
    extra: dict | None = None,
    measurement: str | None = None,
    measured_by: str | None = None,
    unit: str | None = "query",
    units: np.ndarray | None = None,
) -> Path:
    """A run directory, or with `measurement` that evaluation in it, as train and evaluate leave them.

    unit, units: the sampling unit, and that of each query; unit=None: as they left it before units were named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = {"network": NETWORK, "optimizer": {"lr": lr}, "loss": {"seed": seed}, "start": start}
    config = {
        "seed": seed,
        "run_dir": str(folder),
        "data": {"_target_": "simsearch.data.datamodule.RenderedDataModule", "root": "/x"},
        "protocol": {"validation": None, "name": "toy"},
        "model": model,
        "optimizer": {"lr": lr},
        "trainer": {"max_steps": 3},
        "callbacks": {"evaluation": {"ks": [1, 10], "seed": seed}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"wandb_id": "x", **(facts or {})}))
    place = folder / "evaluations" / measurement if measurement else folder
    place.mkdir(parents=True, exist_ok=True)
    mean = float(np.nanmean(ap))
    metrics = {"mAP": mean, "P@10": mean / 2, "rerank/mAP": None, "bytes_per_item": 6.0, "index/latency_ms_p50": 0.5}
    about = {"protocol": "toy", "fingerprint": fingerprint, "attribute": "kind", "junk": None, "exclude_self": True}
    about |= {"metrics": metrics | (extra or {}), "intervals": {"mAP": [mean - 0.02, mean + 0.02]}}
    rows = np.arange(N - Q, N)
    units = rows if units is None else units
    about |= {} if unit is None else {"unit": unit, "units": len(np.unique(units))}
    about |= {} if measured_by is None else {"measured_by": measured_by}
    (place / "metrics.json").write_text(json.dumps({"test": about}))
    table = {"index": rows[::-1], "label": (rows % 3)[::-1], "AP": ap[::-1], "P@10": ap[::-1] / 2}
    table |= {} if unit is None else {"unit": units[::-1]}
    if found is not None:
        table["found"] = pa.array(found[::-1], pa.list_(pa.int64()))
    meta = {"protocol": "toy", "fingerprint": fingerprint} | ({} if unit is None else {"unit": unit})
    pq.write_table(pa.table(table).replace_schema_metadata(meta), place / "per_query.parquet")
    return place


def read(*folders: Path):
    results, missing = read_all(expand(map(str, folders)))
    assert not missing
    return results


def board(results, baseline=0, metric="mAP", also=("P@10",)):
    return leaderboard(results, configuration, baseline=results[baseline], metric=metric, also=also)


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_names_of_runs_are_read_at_any_width(width, tmp_path):
    names = ("pooling=gem_whitening=32_3f9a2c", "pooling=rmac_whitening=128_77b0e1", "b")
    facts = {"train_seconds": 4000.0, "parameters": 5_000_000, "device": "CPU, 2 threads"}
    folders = [make_run(tmp_path / n, values(i, 0.02 * i), lr=i, facts=facts) for i, n in enumerate(names, start=1)]
    entries = board(read(*folders))
    console = Console(width=width, file=io.StringIO())
    console.print(terminal_table(entries, columns(entries, ["mAP", "P@10"]), width))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = "".join(line.split("│")[2].strip() for line in lines if line.count("│") > 2)
    for name in names:
        assert name in text  # at most folded, never cut
    assert "…" not in "".join(lines)
    assert f"{entries[0].values['mAP'].mean:.4f}" in "".join(lines)
    if width >= 80:
        assert "difference" in "".join(lines)
    if width == 80:
        assert "no room for" in " ".join(" ".join(lines).split())


# ------------------------------------------------------------------------------------------ statistics


def test_tests_are_those_of_the_values_by_query(tmp_path):
    a, b, c = values(1), values(2, 0.04), values(3, 0.001)
    entries = board(read(*(make_run(tmp_path / n, v, lr=float(v[0])) for n, v in {"a": a, "b": b, "c": c}.items())))
    by_name = {entry.name: entry for entry in entries}
    assert [entry.name for entry in entries] == sorted("abc", key=lambda n: -{"a": a, "b": b, "c": c}[n].mean())
    assert by_name["a"].is_baseline
    assert by_name["a"].paired is None
    pairs = [tuple(map(torch.from_numpy, pair)) for pair in ((b, a), (c, a))]
    p = torch.tensor([paired_permutation(*pair) for pair in pairs], dtype=torch.float64)
    for name, pair, plain, adjusted in zip("bc", pairs, p.tolist(), holm(p).tolist(), strict=True):
        found = by_name[name].paired
        assert (found.p, found.p_holm, found.queries) == (plain, adjusted, Q)
        assert (found.difference, found.low, found.high) == pytest.approx(paired_interval(*pair))
        change = (pair[0] - pair[1]).numpy()
        steps = stats.t.ppf(1 - 0.05 / 2 / 2, Q - 1) + stats.t.ppf(0.8, Q - 1)  # two tests
        assert found.detectable == pytest.approx(steps * change.std(ddof=1) / Q**0.5)


def test_many_tests_draw_patterns_enough_for_their_correction(tmp_path, monkeypatch):
    runs = read(*(make_run(tmp_path / str(i), values(i, 0.1 * i), lr=i) for i in range(3)))
    monkeypatch.setattr("simsearch.comparison.leaderboard.RESAMPLES", 40)  # enough for two tests
    assert sorted(entry.paired.p for entry in board(runs) if entry.paired) == [1 / 41] * 2
    monkeypatch.setattr("simsearch.comparison.leaderboard.RESAMPLES", 39)
    assert all(entry.paired.p_holm < 0.05 / 2 for entry in board(runs) if entry.paired)


def test_sampling_units_are_tested_as_one(tmp_path):
    """Twelve artists whose five works rise or fall together: far less sure than sixty works would be."""
    units = np.arange(Q) // 5
    shift = np.random.default_rng(3).normal(0.04, 0.05, 12)[units]
    pair = torch.from_numpy(values(1) + shift), torch.from_numpy(values(1))
    b, a = (v.numpy() for v in pair)
    given = {"unit": "artist", "units": units}
    results = read(make_run(tmp_path / "b", b, **given), make_run(tmp_path / "a", a, lr=2, **given))
    entries = board(results, baseline=1)
    entry = next(e for e in entries if e.paired)
    found, means = entry.paired, (pair[0] - pair[1]).reshape(12, 5).mean(1).numpy()
    expected = stats.ttest_1samp(means, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert (found.queries, found.units, entry.unit, entry.units) == (Q, 12, "artist", 12)
    flips = stats.permutation_test((means,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert found.p == pytest.approx(flips, abs=1e-12)
    assert found.p > 10 * paired_permutation(*pair)
    for line in csv.DictReader(io.StringIO(csv_text(entries, ["mAP"], []))):
        assert (line["unit"], line["units"]) == ("artist", "12")
        assert line["paired_units"] == ("" if line["baseline"] == "True" else "12")
    for text in (markdown_table(entries, columns(entries, ["mAP"]), []), page.page(compared(entries, classes=None))):
        assert "by artist (12)" in text.replace("\\", "")


def test_seeds_are_one_entry_over_units(tmp_path):
    units = np.arange(Q) // 5
    results = read(*(make_run(tmp_path / str(s), values(s), seed=s, unit="artist", units=units) for s in (0, 1)))
    (entry,) = board(results)
    both = torch.from_numpy((values(0) + values(1)) / 2)
    expected = mean_interval(both[:, None], torch.from_numpy(units))[0]
    assert entry.values["mAP"].interval == pytest.approx(tuple(expected.tolist()))


def test_other_units_do_not_compare_and_older_runs_go_by_query(tmp_path):
    units = np.arange(Q) // 5
    new = make_run(tmp_path / "new", values(1), unit="artist", units=units)
    old = make_run(tmp_path / "old", values(2), lr=2, unit=None)
    again = make_run(tmp_path / "again", values(3), lr=3, unit=None)
    with pytest.raises(ValueError, match=r"(?s)sampling unit.*by artist: new\n.*by query: old\n.*simsearch evaluate"):
        check_comparable(read(new, old))
    forced = board(read(new, old))
    assert [entry.paired for entry in forced] == [None, None]
    results = read(old, again)
    check_comparable(results)
    entries = board(results)
    assert next(e.paired.units for e in entries if e.paired) == Q
    assert "by query (measured before sampling units were named)" in markdown_table(entries, [], [])
    # A table that has lost its units, or has others, is no longer that of the metrics.
    table = pq.read_table(new / "per_query.parquet")
    kept = table.replace_schema_metadata({k: v for k, v in table.schema.metadata.items() if k != b"unit"})
    pq.write_table(kept, new / "per_query.parquet")
    _, (missing,) = read_all([new])
    assert "different measurements" in missing.reason
    units[0] = 11
    other = make_run(tmp_path / "other", values(4), lr=4, unit="artist", units=units)
    pq.write_table(table, new / "per_query.parquet")
    with pytest.raises(ValueError, match="other and new have the same fingerprint but other queries"):
        board(read(new, other))


def test_seeds_of_a_configuration_are_one_entry(tmp_path):
    starts = [make_run(tmp_path / f"start{s}", values(9), seed=s) for s in (0, 1)]
    seeds = [make_run(tmp_path / f"s{s}", values(s), seed=s, lr=0.5, start=str(starts[s])) for s in (0, 1)]
    other = make_run(tmp_path / "other", values(7, -0.1), lr=0.7)
    results = read(other, *seeds)
    one, two = sorted(board(results), key=lambda entry: len(entry.results))
    assert (one.name, two.name, two.seeds) == ("other", "s0 (2 seeds)", [0, 1])
    means = [values(s).mean() for s in (0, 1)]
    assert two.values["mAP"].mean == pytest.approx(np.mean(means))
    assert two.values["mAP"].deviation == pytest.approx(statistics.stdev(means))
    assert two.values["mAP"].interval[0] < np.mean(means) < two.values["mAP"].interval[1]
    assert one.values["mAP"].deviation is None
    both = (values(0) + values(1)) / 2
    np.testing.assert_allclose(two.queries.value, both, rtol=1e-12)
    assert two.paired.difference == pytest.approx((both - values(7, -0.1)).mean())


def test_one_seed_counts_once(tmp_path):
    start = [make_run(tmp_path / f"start{s}", values(9), seed=s) for s in (0, 1)]
    runs = [make_run(tmp_path / f"r{i}", values(i), seed=s, lr=0.5) for i, s in enumerate((0, 1, 1, 0))]
    runs += [make_run(tmp_path / f"s{s}", values(s), seed=0, lr=0.7, start=str(start[s])) for s in (0, 1)]
    results = read(*runs)
    kept, repeats = without_repeats(results, results[3])  # the baseline stays, though it came last
    assert [result.name for result in kept] == ["r1", "r3", "s0", "s1"]
    assert [(result.name, known.name) for result, known in repeats] == [("r0", "r3"), ("r2", "r1")]
    assert sorted(entry.name for entry in board(kept)) == ["r1 (2 seeds)", "s0 (2 runs)"]


def test_a_run_from_before_units_were_named_is_repeated_by_one_over_queries(tmp_path):
    results = read(make_run(tmp_path / "old", values(1), unit=None), make_run(tmp_path / "new", values(1)))
    kept, ((repeat, known),) = without_repeats(results, results[0])
    assert ([result.name for result in kept], repeat.name, known.name) == (["old"], "new", "old")


def test_what_differs_in_more_than_the_seed_stays_apart(tmp_path):
    runs = [make_run(tmp_path / str(i), values(i), lr=i) for i in range(3)]
    runs.append(make_run(tmp_path / "0", values(8), measurement="again"))
    assert sorted(len(entry.results) for entry in board(read(*runs))) == [1, 1, 1, 1]


def test_queries_without_a_value_are_left_out(tmp_path):
    a, b = values(1), values(2)
    b[5] = a[9] = np.nan
    entry = next(e for e in board(read(make_run(tmp_path / "a", a), make_run(tmp_path / "b", b, lr=2))) if e.paired)
    assert entry.paired.queries == Q - 2
    assert entry.paired.difference == pytest.approx(np.nanmean(b - a))


def test_other_queries_under_one_fingerprint_are_refused(tmp_path):
    a, b = make_run(tmp_path / "a", values(1)), make_run(tmp_path / "b", values(2), lr=2)
    table = pq.read_table(b / "per_query.parquet")
    pq.write_table(table.slice(1), b / "per_query.parquet")
    with pytest.raises(ValueError, match="b and a have the same fingerprint but other queries"):
        board(read(a, b))


def test_a_metric_that_a_run_has_not(tmp_path):
    results = read(make_run(tmp_path / "a", values(1)))
    with pytest.raises(ValueError, match=r"a has no rerank/mAP; it has mAP, P@10$"):
        board(results, metric="rerank/mAP")
    assert board(results, metric="P@10")[0].values["P@10"].mean == pytest.approx(values(1).mean() / 2)


def test_fingerprints_that_differ_are_refused(tmp_path):
    runs = [make_run(tmp_path / n, values(1), fingerprint=f) for n, f in (("a", "feed"), ("b", "beef"), ("c", "feed"))]
    with pytest.raises(
        ValueError, match=r"(?s)cannot be compared.*toy feed by query: a, c\n.*toy beef by query: b\n.*force=true"
    ):
        check_comparable(read(*runs))
    check_comparable(read(runs[0], runs[2]))
    entries = board(read(*runs))
    assert [entry.paired is None for entry in entries if "b" in entry.name] == [True]


# ------------------------------------------------------------------------------------------ finding runs


def test_sweeps_globs_and_measurements(tmp_path):
    jobs = [make_run(tmp_path / "sweeps" / "monday" / str(i), values(i), lr=i) for i in (0, 1, 2, 10)]
    (tmp_path / "sweeps" / "monday" / ".submitit").mkdir()
    again = make_run(jobs[0], values(5), measurement="again")
    assert expand([str(tmp_path / "sweeps")]) == jobs
    assert expand([str(tmp_path / "sweeps" / "monday" / "*")]) == jobs
    assert expand([str(jobs[2]), str(jobs[0]), str(jobs[2])]) == [jobs[2], jobs[0]]
    assert expand([str(tmp_path / "sweeps/monday/*/evaluations/*")]) == [again]
    assert [r.name for r in read(jobs[1], again)] == ["1", "0/again"]
    for wrong in ("nothing", "no*"):
        with pytest.raises(ValueError, match="is not a folder"):
            expand([str(tmp_path / wrong)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="does not hold a run"):
        expand([str(tmp_path / "empty")])


def test_measurements_are_repeated_over_seeds_by_what_measured(tmp_path):
    measured = []
    for seed in (0, 1):
        run = make_run(tmp_path / str(seed), values(seed), seed=seed)
        for name, by in ((f"at-{seed}-o-clock", "a"), ("same", "ab"[seed])):
            measured.append(make_run(run, values(seed), seed=seed, measurement=name, measured_by=by))
    by_a, other = board(read(measured[0], measured[2], measured[3]))
    assert (by_a.seeds, other.seeds) == ([0, 1], [1])  # folders say nothing


def test_what_measures_is_known_but_for_seeds_and_folders():
    one = {"callbacks": {"evaluation": {"ks": [1], "seed": 0, "index": {"factory": "Flat", "seed": 0}}}, "run_dir": "a"}
    same = copy.deepcopy(one) | {"run_dir": "b"}
    same["callbacks"]["evaluation"]["seed"] = 1
    assert measurement_identity(one) == measurement_identity(same)
    same["callbacks"]["evaluation"]["index"]["factory"] = "SQ8"
    assert measurement_identity(one) != measurement_identity(same)
    small, large = (one | {"data": {"size": size, "root": str(size)}} for size in (128, 224))
    assert measurement_identity(small) != measurement_identity(large)
    assert measurement_identity(small) == measurement_identity(small | {"data": {"size": 128, "root": "elsewhere"}})


def test_numbers_in_names_are_sorted_as_numbers(tmp_path):
    names = ["run-10", "run-2", "run-10²"]
    assert sorted(map(Path, names), key=_natural) == [Path("run-2"), Path("run-10"), Path("run-10²")]


def test_short_names_are_unique_and_short():
    assert short_names(["/a/x/1", "/a/y/1", "/a/y/2"]) == ["x/1", "y/1", "2"]
    assert short_names(["/a/run/evaluations/p", "/a/run"]) == ["run/p", "run"]


def test_runs_without_a_result_are_named(tmp_path):
    def spoil(name, do):
        folder = make_run(tmp_path / name, values(1))
        do(folder)
        return folder

    def other_measurement(folder):
        path = folder / "metrics.json"
        path.write_text(path.read_text().replace("feed", "f00"))

    folders = [
        spoil("untested", lambda f: (f / "metrics.json").unlink()),
        spoil("validated", lambda f: (f / "metrics.json").write_text('{"val": {}}')),
        spoil("cut", lambda f: (f / "metrics.json").write_text('{"test": {"metr')),
        spoil("bare", lambda f: (f / "metrics.json").write_text('{"test": {"metrics": {}}}')),
        spoil("headless", lambda f: (f / "config.yaml").unlink()),
        spoil("twisted", lambda f: (f / "config.yaml").write_text("a: [1")),
        spoil("valueless", lambda f: (f / "per_query.parquet").unlink()),
        spoil("torn", lambda f: (f / "per_query.parquet").write_bytes(b"PAR1")),
        spoil(
            "mixed", lambda f: (f / "metrics.json").write_text((f / "metrics.json").read_text().replace("feed", "f00"))
        ),
    ]
    (tmp_path / "stillborn" / ".hydra").mkdir(parents=True)
    results, missing = read_all([*folders, tmp_path / "stillborn"])
    assert not results
    states = {m.name: m.state for m in missing}
    assert [name for name, state in states.items() if state == "unfinished"] == ["untested", "validated", "stillborn"]
    assert len(states) == 10
    reasons = {m.name: m.reason for m in missing}
    assert "not tested" in reasons["untested"]
    assert "metrics.json is damaged" in reasons["cut"]
    assert "KeyError 'intervals'" in reasons["bare"]
    assert reasons["headless"] == "it has no config.yaml"
    assert "config.yaml is damaged" in reasons["twisted"]
    assert "per_query.parquet is missing" in reasons["valueless"]
    assert "per_query.parquet is missing or damaged" in reasons["torn"]
    assert "different measurements" in reasons["mixed"]


# ---------------------------------------------------------------------------------------------- reports


def test_config_differences_leave_out_seeds_places_and_copies(tmp_path):
    entries = board(read(*(make_run(tmp_path / str(i), values(i), lr=i, seed=i) for i in (1, 2))))
    assert config_differences(entries, compare.PLACES) == {"optimizer.lr": [e.name for e in entries]}
    other = copy.deepcopy(dict(entries[0].results[0].config)) | {"trainer": {"max_steps": 4, "flag": True, "x": None}}
    object.__setattr__(entries[0].results[0], "config", other)
    differences = config_differences(entries, (*compare.PLACES, "optimizer"))
    assert differences == {
        "model.optimizer.lr": [e.name for e in entries],
        "trainer.flag": ["true", "-"],
        "trainer.max_steps": ["4", "3"],
        "trainer.x": ["null", "-"],
    }


def test_csv_and_markdown(tmp_path):
    facts = {"train_seconds": 120, "device": "cpu", "parameters": 5}
    runs = [make_run(tmp_path / f"{n}", values(i), lr=i, facts=facts) for i, n in enumerate(("a|b", "c_*d*"))]
    entries = board(read(*runs))
    (tmp_path / "gone").mkdir()
    _, missing = read_all([tmp_path / "gone"])
    lines = list(csv.DictReader(io.StringIO(csv_text(entries, ["mAP", "P@10"], missing))))
    assert [line["state"] for line in lines] == ["finished", "finished", "unfinished"]
    for line, entry in zip(lines, entries, strict=False):
        assert float(line["mAP"]) == entry.values["mAP"].mean
        assert (line["bytes_per_item"], line["train_seconds"], line["parameters"]) == ("6.0", "120.0", "5.0")
        assert line["places"] == entry.results[0].place
    tested = next(line for line in lines if line["p"])
    assert float(tested["difference"]) == next(e for e in entries if e.paired).paired.difference
    assert lines[2]["reason"]
    text = markdown_table(entries, columns(entries, ["mAP"]), missing)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, "a name must not add a cell"
    assert r"a\|b" in text
    assert "2 min (cpu)" in text
    assert "fingerprint feed" in text


def test_columns_without_anything_to_show_are_left_out(tmp_path):
    entries = board(read(make_run(tmp_path / "a", values(1)), make_run(tmp_path / "b", values(2), lr=2)))
    assert [c.title for c in columns(entries, ["mAP"])] == [
        "mAP",
        "difference",
        "p Holm",
        "MDE 80%",
        "bytes",
        "ms/query",
    ]
    forced = board(read(make_run(tmp_path / "a", values(1)), make_run(tmp_path / "c", values(2), fingerprint="beef")))
    assert [c.title for c in columns(forced, ["mAP"])][-1] == "protocol"


def test_durations():
    given = {0.93: "0.93 s", 5: "5 s", 59.6: "60 s", 60: "1 min", 1800: "30 min", 3600: "1 h", 5400: "1.5 h"}
    assert {seconds: duration(seconds) for seconds in given} == given


# ------------------------------------------------------------------------------------------------ the page


class Tags(HTMLParser):
    """All elements with their attributes, and all text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._raw = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("style", "script")

    def handle_endtag(self, tag):
        self._raw = False

    def handle_data(self, data):
        self.text += "" if self._raw else data


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def compared(entries, **changes) -> page.Comparison:
    given = {
        "entries": entries,
        "columns": columns(entries, ["mAP", "P@10"]),
        "metric": "mAP",
        "missing": [],
        "classes": CLASSES,
        "cases": {},
        "differences": {},
        "forced": False,
    }
    return page.Comparison(**(given | changes))


def case(data: bytes = b"\x89PNG picture", caption: str = "cat") -> page.Case:
    picture = page.Picture(data, caption, None)
    return page.Case(picture, 0.9, 0.1, [picture], [page.Picture(b"\xff\xd8 photo", caption, False)])


def test_the_page_holds_no_markup_of_others_and_needs_nothing_else(tmp_path):
    facts = {"train_seconds": 60, "device": HOSTILE}
    entries = board(read(*(make_run(tmp_path / n, values(i), lr=i, facts=facts) for i, n in enumerate("ab"))))
    for entry in entries:
        object.__setattr__(entry, "name", f"{entry.name} {HOSTILE}")
        object.__setattr__(entry.results[0], "protocol", HOSTILE)
    tested = next(entry for entry in entries if entry.paired)
    text = page.page(
        compared(
            entries,
            missing=[Missing(HOSTILE, "damaged", HOSTILE)],
            classes=(HOSTILE, "bee", "cow"),
            cases={tested.name: [case(caption=HOSTILE)]},
            differences={HOSTILE: [HOSTILE, "2"]},
            forced=True,
        )
    )
    found = Tags(text)
    names = [name for name, _ in found.tags]
    assert names.count("script") == names.count("style") == 1
    assert set(names) <= {
        *("html", "head", "meta", "title", "style", "body", "script", "section", "h1", "h2", "h3", "p", "code", "div"),
        *("table", "thead", "tbody", "tr", "th", "td", "button", "small", "figure", "figcaption", "details", "summary"),
        *("svg", "line", "text", "circle", "rect", "path", "img", "span", "br", "strong"),
    }
    assert found.text.count(HOSTILE) >= 8
    for name, attributes in found.tags:
        assert not [key for key in attributes if key.startswith("on") or key in ("href", "action", "xlink:href")], name
        if "src" in attributes:
            assert re.fullmatch(r"data:image/(png|jpeg);base64,[\w+/=]+", attributes["src"])
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in re.sub(r"http-equiv", "", text)
    policy = next(a["content"] for n, a in found.tags if n == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_page_bounds_its_pictures(tmp_path, monkeypatch):
    entries = board(read(*(make_run(tmp_path / n, values(i), lr=i) for i, n in enumerate("abc"))))
    one, two = (entry.name for entry in entries if entry.paired)
    monkeypatch.setattr(page, "PICTURE_BYTES", 1000)
    text = page.page(compared(entries, cases={one: [case(b"\x89PNG" + b"x" * 300)] * 2, two: [case()]}))
    assert "left out: the page holds at most" in text
    assert len(re.findall("<img", text)) == 3
    assert "kept nothing" in page.page(compared(entries, cases={one: "kept nothing", two: "kept nothing"}))


def test_means_by_class(tmp_path):
    a = values(1)
    a[4] = np.nan
    (entry,) = board(read(make_run(tmp_path / "a", a)))
    label = np.arange(N - Q, N) % 3
    assert page.class_means(entry) == pytest.approx({c: np.nanmean(a[label == c]) for c in range(3)})


def test_classes_in_which_a_run_has_no_value_are_left_out(tmp_path):
    """As by definitions/mAP@10_found_only, where nothing of a class was found."""
    label, a, b = np.arange(N - Q, N) % 3, values(1), values(2)
    b[label == 1] = np.nan
    text = page.page(compared(board(read(make_run(tmp_path / "a", a), make_run(tmp_path / "b", b, lr=0.5)))))
    (table,) = re.findall("mAP by class.*?</section>", text, re.DOTALL)
    assert [name in table for name in ("ant", "bee", "cow")] == [True, False, True]


def test_the_page_of_one_run_and_of_runs_without_values_by_query(tmp_path):
    (entry,) = board(read(make_run(tmp_path / "a", values(1))))
    text = page.page(compared([entry]))
    assert "Quality and cost" not in text
    assert "mAP by class" in text
    extra = {"definitions/mAP@10_R": 0.217, "definitions/mAP@10_found": 0.722}
    results = read(make_run(tmp_path / "b", values(1), extra=extra))
    text = page.page(compared(board(results, also=list(extra))))
    assert re.search(r"mAP@10_R</button>.*mAP@10_found</button>.*>0.2170</td>.*>0.7220</td>", text, re.DOTALL)


def test_a_scatter_plot_marks_the_front():
    generator = np.random.default_rng(3)
    for _ in range(20):
        xs, ys = generator.integers(1, 9, 12), generator.integers(1, 9, 12) / 9
        points = [charts.Point(i, "p", float(x), float(y), y, y) for i, (x, y) in enumerate(zip(xs, ys, strict=True))]
        beaten = [any((o.x <= p.x and o.y > p.y) or (o.x < p.x and o.y >= p.y) for o in points) for p in points]
        wanted = {(p.x, p.y) for p, b in zip(points, beaten, strict=True) if not b}
        assert {(p.x, p.y) for p in charts._front(points)} == wanted
    text = charts.scatter(points, "bytes", "mAP", "{:g}".format, [1.0, 2.0, 4.0, 8.0])
    assert text.count("<circle") == 12
    with pytest.raises(ValueError, match="above 0"):
        charts.scatter([charts.Point(1, "p", 0.0, 1, 1, 1)], "bytes", "mAP", "{:g}".format, [1.0])


def test_a_histogram_counts_every_query_but_equal_ones():
    change = torch.tensor([-1.0, -0.4, 0.0, 0.0, 0.3, 0.31, 1.0, torch.nan], dtype=torch.float64)
    text = charts.histogram(change, "mAP", 1.0, bins=10)
    counts = [(kind, int(n)) for kind, n in re.findall(r'class="(worse|better)".*?<title>(\d+) queries', text)]
    assert sum(n for kind, n in counts if kind == "worse") == 2
    assert sum(n for kind, n in counts if kind == "better") == 3


# --------------------------------------------------------------------------------------------- regressions


@pytest.fixture
def toy_data(monkeypatch, collection):
    monkeypatch.setattr(configs, "build_data", lambda config: SimpleNamespace(collection=collection))


def test_regressions_show_what_both_runs_kept(tmp_path, toy_data, collection):
    good, bad = values(1), values(1)
    bad[[3, 8, 11]] -= (0.2, 0.3, 0.1)
    near, far = ([[(q + i) % N for i in range(o, o + 10)] for q in range(N - Q, N)] for o in (3, 1))
    far[8] = [5, -1]
    runs = [make_run(tmp_path / "a", good, found=near), make_run(tmp_path / "b", bad, lr=2, found=far)]
    entries = board(read(*runs))
    names, cases = compare.pictures(entries, "mAP", 2, 4)
    assert names == CLASSES
    (found,) = cases.values()
    assert [(c.before, c.after) for c in found] == [(good[i], bad[i]) for i in (8, 3)]
    worst = found[0]
    row = N - Q + 8
    thumbnails = {encode_thumbnail(collection.images[i], regressions.THUMBNAIL_SIDE): i for i in range(N)}
    assert thumbnails[worst.query.data] == row
    assert [thumbnails[p.data] for p in worst.found_before] == near[8][:4]
    assert [p.right for p in worst.found_before] == [i % 3 == row % 3 for i in near[8][:4]]
    assert [thumbnails[p.data] for p in worst.found_after] == [5]
    assert compare.pictures(entries, "mAP", 0, 4) == (None, {})
    assert "re-ranking" in next(iter(compare.pictures(entries, "rerank/mAP", 2, 4)[1].values()))


@pytest.mark.parametrize("junk", [None, "pair"])
def test_regressions_ask_the_catalog_of_a_run_that_kept_nothing(tmp_path, toy_data, collection, junk):
    torch.manual_seed(0)
    encoder = build_encoder({"model": NETWORK})
    codes = encode(encoder, collection.images)
    index = FaissIndex("BFlat", metric="hamming")
    index.add(codes)
    for name, shift in (("a", 0.0), ("b", -0.1)):
        folder = make_run(tmp_path / name, values(1, shift), lr=shift)
        about = json.loads((folder / "metrics.json").read_text())
        about["test"]["junk"] = junk
        (folder / "metrics.json").write_text(json.dumps(about))
        write_catalog(
            folder / "catalog",
            index=index,
            items=item_table({"path": [f"toy/{i}" for i in range(N)]}, [b"-"] * N),
            encoder=encoder,
            config={"model": NETWORK},
            about={"source": {"data": "toy", "protocol": "toy"}},
        )
    results = read(tmp_path / "a", tmp_path / "b")
    entries = board(results)
    line = next(entry for entry in entries if entry.is_baseline)
    judge = regressions.Judge.of(collection, line)
    rows = [45, 70]
    found = regressions.neighbours(results[0], judge, rows, 5)
    bits = np.unpackbits(codes.numpy(), axis=1).astype(int)
    for row, near in zip(rows, found, strict=True):
        distance = np.abs(bits - bits[row]).sum(1)
        distance[[row, row ^ 1] if junk else [row]] = 99
        assert distance[near].tolist() == sorted(distance)[:5]
        assert row not in near
    other = read_json(tmp_path / "a/catalog/catalog.json") | {"source": {"data": "toy", "protocol": "x"}}
    write_json(tmp_path / "a/catalog/catalog.json", other)
    with pytest.raises(ValueError, match="the catalog of a holds toy, x"):
        regressions.neighbours(results[0], judge, rows, 5)
    reasons = compare.pictures(entries, "mAP", 2, 4)[1]
    assert list(reasons.values()) == ["no pictures: the catalog of a holds toy, x"]


def test_regressions_of_other_data_are_not_shown(tmp_path, monkeypatch, toy_data, collection):
    entries = board(read(make_run(tmp_path / "a", values(1)), make_run(tmp_path / "b", values(2), lr=2)))
    assert "kept no neighbours" in next(iter(compare.pictures(entries, "mAP", 2, 4)[1].values()))
    shuffled = Collection(
        "toy",
        collection.images,
        collection.labels.flip(0),
        collection.attributes,
        collection.classes,
        collection.is_test,
    )
    monkeypatch.setattr(configs, "build_data", lambda config: SimpleNamespace(collection=shuffled))
    assert "have changed since the runs" in next(iter(compare.pictures(entries, "mAP", 2, 4)[1].values()))


# -------------------------------------------------------------------------------------------------- W&B


class FakeApi:
    """What of wandb.Api is used."""

    def __init__(self, runs) -> None:
        self._runs, self.asked = runs, []

    def runs(self, path, filters):
        self.asked.append((path, filters))
        return iter(self._runs)


def wandb_run(name: str, mean: float, *, state: str = "finished", identity: str = "id", **summary) -> SimpleNamespace:
    test = {"test/mAP": mean, "test/mAP_low": mean - 0.1, "test/mAP_high": mean + 0.1, "test/bytes_per_item": 6}
    stated = {"test/fingerprint": "feed", "test/protocol": "toy", "_wandb": {"runtime": 3}, "train_seconds": 9}
    return SimpleNamespace(name=name, id=identity, state=state, summary=test | stated | summary, config={"seed": 1})


def test_runs_of_wandb_bring_summaries_only():
    api = FakeApi([wandb_run("x", 0.5), wandb_run("y", 0.75, identity="2"), wandb_run("z", 0, state="crashed")])
    results, missing = read_wandb(api, "team/project/group1")
    assert api.asked == [("team/project", {"$or": [{"group": "group1"}, {"sweep": "group1"}]})]
    assert [(m.name, m.state) for m in missing] == [("z", "unfinished")]
    entries = leaderboard(results, lambda result: result.place, baseline=results[0], metric="mAP", also=())
    assert [entry.name for entry in entries] == ["y", "x"]
    assert entries[1].values["mAP"].interval == (0.4, 0.6)
    assert [entry.paired for entry in entries] == [None, None]
    assert entries[0].cost("train_seconds") == 9
    assert "have only summaries" in page.page(compared(entries, classes=None))
    assert FakeApi([]).asked == []
    for address in ("team", "team/", "a/b/c/d"):
        with pytest.raises(ValueError, match="is not an address"):
            read_wandb(api, address)
    with pytest.raises(ValueError, match="has no runs"):
        read_wandb(FakeApi([]), "team/project")


def test_the_command_reads_wandb_beside_folders(tmp_path, monkeypatch):
    @contextmanager
    def reached():
        yield FakeApi([wandb_run("remote", 0.9)])

    monkeypatch.setattr(tracking, "wandb_api", reached)
    make_run(tmp_path / "local", values(1))
    done = simsearch("compare", f"runs=[{tmp_path / 'local'},wandb:team/project]", f"out={tmp_path / 'out'}")
    assert re.search(r"1 .*remote.*0\.9000", done.stdout)
    assert "0 paired tests" in done.stdout


def test_runs_of_wandb_keep_their_names_beside_a_baseline_from_elsewhere(tmp_path):
    make_run(tmp_path / "a" / "x", values(1))
    near = read(make_run(tmp_path / "b" / "x", values(2), lr=2))
    far, _ = read_wandb(FakeApi([wandb_run("remote", 0.9)]), "team/project")
    baseline, together = find_baseline(str(tmp_path / "a" / "x"), [*near, *far])
    assert [result.name for result in together] == ["a/x", "b/x", "remote"]
    assert baseline is together[0]


def test_wandb_out_of_reach_is_one_clear_line(tmp_path):
    done = simsearch("compare", "runs=wandb:team/project", f"out={tmp_path / 'out'}", expect=1)
    assert re.fullmatch(r"simsearch compare: .*W&B.*\n", done.stderr)


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_end_to_end(tmp_path, toy_data):
    near = [[(q + i) % N for i in range(10)] for q in range(N - Q, N)]
    for i in (0, 1, 2):
        make_run(tmp_path / "sweep dir" / str(i), values(i, 0.1 * i), lr=i, found=near)
    (tmp_path / "sweep dir" / "3" / ".hydra").mkdir(parents=True)
    out = tmp_path / "out"
    done = simsearch("compare", f"runs={tmp_path / 'sweep dir'}", f"out={out}", "regressions=2", "k=3")
    assert re.search(r"│ 1 │ 2 .*\n.*\n.*2 │ 1 .*\n.*\n.*3 │ 0 .*baseline", done.stdout)
    assert "3: unfinished, it ended before" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "leaderboard.csv", "leaderboard.md"]
    text = (out / "index.html").read_text()
    found = Tags(text)
    assert [h for h in ("Quality and cost", "Differences by query", "mAP by class", "Worst regressions") if h in text]
    assert sum(name == "img" for name, _ in found.tags) >= 1 + 2 * 3
    assert "&lt;b&gt;cow&lt;/b&gt;" in text
    assert "optimizer.lr" in text

    again = simsearch("compare", f"runs={tmp_path / 'sweep dir'}", "baseline=2", f"out={out}", "regressions=0")
    assert "baseline 2; 2 paired tests" in again.stdout
    assert "<img" not in (out / "index.html").read_text()


def test_the_command_takes_a_baseline_from_elsewhere(tmp_path, toy_data):
    make_run(tmp_path / "a" / "x", values(1), lr=1)
    make_run(tmp_path / "b" / "x", values(2), lr=2)
    given = [f"runs={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "regressions=0"]
    done = simsearch("compare", *given, f"baseline={tmp_path / 'b' / 'x'}")
    assert "baseline b/x; 1 paired tests" in done.stdout
    done = simsearch("compare", *given, "baseline=nobody", expect=1)
    assert "baseline=nobody is neither a folder nor one of the runs x" in done.stderr


def test_the_command_does_not_rank_by_a_cost(tmp_path):
    make_run(tmp_path / "x", values(1))
    for metric in ("bytes_per_item", "index/latency_ms_p50"):
        done = simsearch("compare", f"runs={tmp_path / 'x'}", f"metric={metric}", f"out={tmp_path / 'out'}", expect=1)
        assert f"metric={metric} is a cost" in done.stderr


def test_the_command_refuses_to_rank_what_does_not_compare(tmp_path):
    for name in ("feed", "beef"):
        make_run(tmp_path / "runs" / name, values(1), fingerprint=name)
    given = [f"runs={tmp_path / 'runs' / 'feed'},{tmp_path / 'runs' / 'beef'}", f"out={tmp_path / 'out'}"]
    done = simsearch("compare", *given, expect=1)
    assert "cannot be compared" in done.stderr
    assert not (tmp_path / "out").exists()
    done = simsearch("compare", *given, "force=true")
    assert "0 paired tests" in done.stdout
    assert "their values cannot be compared" in done.stdout
    assert 'class="warning"' in (tmp_path / "out" / "index.html").read_text()
    (tmp_path / "runs" / "feed" / "metrics.json").unlink()
    done = simsearch("compare", f"runs={tmp_path / 'runs' / 'feed'}", expect=1)
    assert "no run has a finished test" in done.stderr
    assert "feed: unfinished" in done.stderr
