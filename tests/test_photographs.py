"""Photographs of works as queries: their tables, what is measured of the answers, the command, the simulator."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import simsearch
from PIL import Image
from scipy.stats import t as student
from sklearn.metrics import average_precision_score

from simsearch.data.photograph_tables import (
    Photograph,
    linked,
    photograph_units,
    photographs_fingerprint,
    read_photograph,
    read_photographs,
)
from simsearch.evaluation.photographs import Answers, compare_photographs, measure_photographs, measure_queries
from simsearch.functional.open_set import global_average_precision, jackknifed_average_precision
from simsearch.functional.significance import jackknife_difference, jackknife_interval
from simsearch.images import decode_thumbnail
from simsearch.search.catalog import read_catalog
from simsearch.search.engine import Engine
from simsearch.search.works import works_named

ROOT = Path(__file__).parent.parent
SIMULATOR = ROOT / "experiments" / "2026-11-28-photographs" / "simulate.py"


def table(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


class TestTable:
    def test_rows_of_one_photograph_and_box_are_one_query(self, tmp_path):
        found = read_photographs(
            table(
                tmp_path / "p.csv",
                "path,work,x,y,w,h,unit",
                "a.jpg,one,,,,,visit",
                "a.jpg,two,,,,,visit",
                "a.jpg,one,1,2,30,40,visit",
                "b.jpg,,,,,,",
            )
        )
        assert found == [
            Photograph("a.jpg", None, ("one", "two"), ("visit",)),
            Photograph("a.jpg", (1.0, 2.0, 30.0, 40.0), ("one",), ("visit",)),
            Photograph("b.jpg", None, ()),
        ]

    @pytest.mark.parametrize(
        ("lines", "said"),
        [
            (["path,title", "a.jpg,one"], "needs path and work"),
            (["path,work,x,y", "a.jpg,one,1,2"], "all four"),
            (["path,work", "/etc/a.jpg,one"], "row 1.*absolute"),
            (["path,work", "a.jpg,one", "../a.jpg,one"], "row 2.*leaves the root"),
            (["path,work,x,y,w,h", "a.jpg,one,1,2,0,4"], "row 1.*w, h > 0"),
            (["path,work,x,y,w,h", "a.jpg,one,1,2,3,"], "row 1.*w, h > 0"),
            (["path,work,x,y,w,h", "a.jpg,one,1,2,nan,4"], "row 1.*w, h > 0"),
            (["path,work,x,y,w,h", "a.jpg,one,left,2,3,4"], "row 1.*w, h > 0"),
            (["path,work", "a.jpg,one,more"], "line 2"),
            (["path,work"], "no photograph"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, lines, said):
        with pytest.raises(ValueError, match=said):
            read_photographs(table(tmp_path / "p.csv", *lines))

    def test_a_box_is_cut_from_the_upright_image(self, tmp_path):
        pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
        exif = Image.Exif()
        exif[274] = 6  # to be turned by 90 degrees
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        upright = np.rot90(pixels, -1)
        assert np.array_equal(read_photograph(tmp_path / "a.png", None).permute(1, 2, 0), upright)
        cut = read_photograph(tmp_path / "a.png", (1, 2, 3, 4))
        assert np.array_equal(cut.permute(1, 2, 0), upright[2:6, 1:4])
        with pytest.raises(ValueError, match="6 x 8 pixels"):
            read_photograph(tmp_path / "a.png", (1, 2, 7, 4))

    def test_the_unit_is_what_shares_a_work_a_visit_or_a_file(self):
        shots = [
            Photograph("a", None, ("one",)),
            Photograph("b", None, ("two",)),
            Photograph("c", None, ("two", "one")),
            Photograph("d", None, ()),
            Photograph("d", (0.0, 0.0, 1.0, 1.0), ()),
            Photograph("e", None, (), ("visit",)),
            Photograph("f", None, ("three",), ("visit", "another")),
        ]
        assert photograph_units(shots).tolist() == [0, 0, 0, 1, 1, 2, 2]

    def test_linked_is_what_a_search_of_the_graph_finds(self):
        rng = random.Random(0)
        for _ in range(30):
            marks = [[rng.randrange(12) for _ in range(rng.randrange(1, 3))] for _ in range(10)]
            number = list(range(10))
            for _ in range(10):  # spread the least number until it is everywhere
                number = [
                    min(n for n, other in zip(number, marks, strict=True) if set(other) & set(own)) for own in marks
                ]
            found = linked(marks).tolist()
            assert [[a == b for a in found] for b in found] == [[a == b for a in number] for b in number]

    def test_the_fingerprint_is_of_photographs_works_and_items_in_any_order(self, tmp_path):
        for name in ("a.jpg", "b.jpg"):
            (tmp_path / name).write_bytes(b"x")
        shots = [Photograph("a.jpg", None, ("one",)), Photograph("b.jpg", None, ())]
        same = photographs_fingerprint(shots, tmp_path, [["i1"], []], ["i1", "i2"])
        assert same == photographs_fingerprint(shots[::-1], tmp_path, [[], ["i1"]], ["i2", "i1"])
        assert same != photographs_fingerprint(shots, tmp_path, [["i2"], []], ["i1", "i2"])
        assert same != photographs_fingerprint(shots, tmp_path, [["i1"], []], ["i1", "i2", "i3"])
        (tmp_path / "b.jpg").write_bytes(b"xy")
        assert same != photographs_fingerprint(shots, tmp_path, [["i1"], []], ["i1", "i2"])
        with pytest.raises(FileNotFoundError, match=r"1 of 3.*c\.jpg"):
            photographs_fingerprint([*shots, Photograph("c.jpg", None, ())], tmp_path, [["i1"], [], []], ["i1"])


def drawn(seed: int, queries: int = 40, ties: bool = True) -> tuple[Answers, list[list[int]], torch.Tensor]:
    """Random answers of up to 6 works of 15, some photographs with two right works and some with none."""
    rng = np.random.default_rng(seed)
    right = [sorted(rng.choice(15, rng.integers(0, 3), replace=False).tolist()) for _ in range(queries)]
    right[0] = [3]
    works = np.full((queries, 6), -1)
    confidence = np.full((queries, 6), -np.inf)
    accepted = np.zeros((queries, 6), dtype=bool)
    for row in range(queries):
        length = rng.integers(0, 7)
        likely = rng.permutation(15)
        if right[row] and rng.random() < 0.7:
            likely = np.array([*right[row], *(work for work in likely if work not in right[row])])
        works[row, :length] = likely[:length]
        score = np.sort(rng.normal(size=length))[::-1]
        confidence[row, :length] = score.round(1) if ties else score
        accepted[row, :length] = score > 0.8
    units = torch.from_numpy(rng.integers(0, 12, queries))
    return Answers(torch.from_numpy(works), torch.from_numpy(confidence), torch.from_numpy(accepted)), right, units


def by_hand(answers: Answers, right: list[list[int]]) -> list[dict[str, float]]:
    rows = []
    for works, taken, own in zip(answers.works.tolist(), answers.accepted.tolist(), right, strict=True):
        found: dict[str, float] = {}
        called = {work for work, one in zip(works, taken, strict=True) if one and work >= 0}
        if own:
            found["R@1"] = float(works[0] in own)
            found["R@5"] = float(any(work in own for work in works[:5]))
            precisions = [
                sum(w in own for w in works[: place + 1]) / (place + 1) for place, w in enumerate(works) if w in own
            ]
            found["AP@6_minRk"] = sum(precisions) / min(len(own), 6)
            found["false"] = float(bool(called - set(own)))
            found["found"] = 0.0 if found["false"] else len(called) / len(own)
            found["unknown"] = 1 - found["false"] - found["found"]
        else:
            found["no_match/false"] = float(bool(called))
        rows.append(found)
    return rows


class TestMeasures:
    @pytest.mark.parametrize("seed", range(5))
    def test_each_photograph_is_measured_as_by_hand(self, seed):
        answers, right, _ = drawn(seed)
        found = measure_queries(answers, right)
        for row, one in enumerate(by_hand(answers, right)):
            got = {name: float(values[row]) for name, values in found.items() if not values[row].isnan()}
            assert got == pytest.approx(one)

    def test_for_one_work_the_mean_of_ap_is_the_mean_reciprocal_rank(self):
        answers, right, units = drawn(3)
        right = [own[:1] for own in right]
        ranks = [
            works.index(own[0]) + 1 if own[0] in works else np.inf
            for works, own in zip(answers.works.tolist(), right, strict=True)
            if own
        ]
        assert measure_photographs(answers, right, units).metrics["mAP@6_minRk"] == pytest.approx(
            np.mean(1 / np.array(ranks))
        )

    @pytest.mark.parametrize("seed", range(5))
    def test_micro_ap_is_scikit_learns_over_all_pairs(self, seed):
        answers, right, units = drawn(seed, ties=False)
        pairs = [
            (score, work in own)
            for works, scores, own in zip(answers.works.tolist(), answers.confidence.tolist(), right, strict=True)
            for work, score in zip(works, scores, strict=True)
            if work >= 0
        ]
        # scikit-learn divides by the right pairs that are there; those that were not found have precision 0.
        total = sum(map(len, right))
        scores, correct = zip(*pairs, strict=True)
        expected = average_precision_score(correct, scores) * sum(correct) / total
        assert measure_photographs(answers, right, units).metrics["microAP"] == pytest.approx(expected)

    @pytest.mark.parametrize("seed", range(3))
    def test_gap_is_the_mean_over_orders_of_equal_confidence(self, seed):
        answers, right, units = drawn(seed, queries=60)
        first = [
            (scores[0], works[0] in own)
            for works, scores, own in zip(answers.works.tolist(), answers.confidence.tolist(), right, strict=True)
            if works[0] >= 0
        ]
        rng, sums = random.Random(0), []
        for _ in range(3000):
            rng.shuffle(first)
            hits, total = 0, 0.0
            for place, (_, correct) in enumerate(sorted(first, key=lambda one: -one[0]), start=1):
                hits += correct
                total += hits / place * correct
            sums.append(total / sum(map(bool, right)))
        error = np.std(sums) / len(sums) ** 0.5
        assert measure_photographs(answers, right, units).metrics["GAP"] == pytest.approx(np.mean(sums), abs=5 * error)

    def test_a_distractor_with_more_confidence_costs_precision(self):
        right = [[0], []]
        sure = Answers(torch.tensor([[0], [1]]), torch.tensor([[0.9], [0.8]]).double(), None)
        unsure = Answers(torch.tensor([[0], [1]]), torch.tensor([[0.7], [0.8]]).double(), None)
        units = torch.arange(2)
        assert measure_photographs(sure, right, units).metrics == {
            "R@1": 1, "R@5": 1, "mAP@1_minRk": 1, "GAP": 1, "microAP": 1,
        }  # fmt: skip
        assert measure_photographs(unsure, right, units).metrics["GAP"] == 0.5

    def test_intervals_come_for_every_number(self):
        measured = measure_photographs(*drawn(1))
        assert set(measured.intervals) == set(measured.metrics)
        for name, (low, high) in measured.intervals.items():
            assert 0 <= low <= measured.metrics[name] <= high <= 1

    def test_without_a_match_only_false_answers_are_measured(self):
        answers, right, units = drawn(0)
        answers = replace(answers, accepted=answers.confidence > answers.confidence.median())
        measured = measure_photographs(answers, [[] for _ in right], units)
        assert set(measured.metrics) == set(measured.intervals) == {"no_match/false"}
        taken = (answers.accepted & (answers.works >= 0)).any(1).double().mean()
        assert measured.metrics["no_match/false"] == pytest.approx(float(taken))
        with pytest.raises(ValueError, match="no photograph shows"):
            measure_photographs(replace(answers, accepted=None), [[] for _ in right], units)

    @pytest.mark.parametrize("wrong", [[[0.5, 0.6]], [[torch.nan, 0.0]]])
    def test_confidence_falls_along_a_list(self, wrong):
        with pytest.raises(ValueError, match="NaN or rise"):
            Answers(torch.tensor([[1, 2]]), torch.tensor(wrong).double(), None)


class TestPairs:
    def test_the_same_answers_do_not_differ(self):
        answers, right, units = drawn(2)
        for pair in compare_photographs(answers, answers, right, units):
            assert (pair.difference, pair.p) == (0, 1), pair

    def test_differences_are_those_of_the_values_on_lists_of_equal_length(self):
        (ours, right, units), (theirs, _, _) = drawn(4), drawn(5)
        short = Answers(theirs.works[:, :4], theirs.confidence[:, :4], theirs.accepted[:, :4])
        cut = Answers(ours.works[:, :4], ours.confidence[:, :4], ours.accepted[:, :4])
        a, b = (measure_photographs(one, right, units).metrics for one in (cut, short))
        found = {pair.metric: pair for pair in compare_photographs(ours, short, right, units)}
        assert set(found) == set(a)
        for name, pair in found.items():
            assert pair.difference == pytest.approx(a[name] - b[name])
            assert pair.low <= pair.difference <= pair.high

    def test_a_great_difference_is_seen_in_gap(self):
        answers, right, units = drawn(6, queries=200)
        good = [own or [99] for own in right]
        works = torch.tensor([[own[0]] for own in good])
        sure = torch.tensor([[1.0 if own else 0.0] for own in right], dtype=torch.float64)
        better = Answers(works, sure, None)
        found = {pair.metric: pair for pair in compare_photographs(better, answers, right, units)}
        assert found["GAP"].difference > 0.3
        assert found["GAP"].p < 0.001


class TestJackknife:
    @pytest.mark.parametrize("seed", range(5))
    def test_without_a_unit_is_the_value_of_the_others(self, seed):
        rng = np.random.default_rng(seed)
        count = 80
        confidence = torch.from_numpy(rng.normal(size=count).round(1))
        correct = torch.from_numpy(rng.random(count) < 0.4)
        units = torch.from_numpy(rng.integers(0, 9, count))
        positives = units[correct].bincount(minlength=10) + torch.from_numpy(
            rng.integers(0, 2, 10)
        )  # unit 9: no answer
        found = jackknifed_average_precision(confidence, correct, units, positives)
        for unit in range(10):
            kept = units != unit
            total = int(positives.sum() - positives[unit])
            expected = global_average_precision(confidence[kept], correct[kept], total)
            assert float(found[unit]) == pytest.approx(expected, abs=1e-12)

    def test_blocks_of_units_change_nothing(self, monkeypatch):
        rng = np.random.default_rng(0)
        given = (
            torch.from_numpy(rng.normal(size=300)),
            torch.from_numpy(rng.random(300) < 0.4),
            torch.from_numpy(rng.integers(0, 50, 300)),
            torch.full((50,), 6),
        )
        whole = jackknifed_average_precision(*given)
        monkeypatch.setattr("simsearch.functional.open_set._BLOCK", 300)
        assert torch.equal(jackknifed_average_precision(*given), whole)

    def test_of_a_mean_it_is_the_error_of_the_mean(self):
        values = np.random.default_rng(0).normal(size=50)
        without = torch.from_numpy((values.sum() - values) / 49)
        low, high, _ = jackknife_difference(values.mean(), without, torch.ones(50))
        reach = student.ppf(0.975, 49) * values.std(ddof=1) / 50**0.5
        assert (low, high) == pytest.approx((values.mean() - reach, values.mean() + reach))

    def test_nothing_wrong_is_as_sure_as_the_units_with_something_to_find(self):
        low, high = jackknife_interval(1.0, torch.ones(30), torch.tensor([1] * 10 + [0] * 20))
        assert (low, high) == pytest.approx((0.025**0.1, 1.0))  # Clopper and Pearson, 10 of 10

    def test_one_unit_tells_nothing(self):
        low, high, p = jackknife_difference(0.5, torch.tensor([0.5]), torch.ones(1))
        assert (low, high, p) == (-np.inf, np.inf, 1.0)

    @pytest.mark.slow
    @pytest.mark.parametrize(("works", "most", "shift"), [(60, 1, 3.0), (60, 3, 3.0), (200, 3, 4.0), (300, 1, 6.0)])
    def test_the_interval_of_gap_and_micro_ap_holds_the_truth(self, works, most, shift):
        """95 % intervals over works, a third of them unknown: at least .91 of 200 samples, and the truth of 60,000."""

        def draw(rng: np.random.Generator, works: int) -> tuple[Answers, list[list[int]], torch.Tensor]:
            unit = np.repeat(np.arange(works), rng.integers(1, most + 1, works))
            known = unit % 3 != 2
            own, other = rng.normal(size=works)[unit], rng.normal(size=works)[unit]
            scores = rng.normal(size=(len(unit), 3)) + 0.3 * other[:, None]
            numbers = 10**6 + np.arange(scores.size).reshape(scores.shape)
            scores[known, 0] = (shift + 0.7 * own + 0.7 * rng.normal(size=len(unit)))[known]
            numbers[known, 0] = unit[known]
            order = np.argsort(-scores, axis=1)
            lists = [torch.from_numpy(np.take_along_axis(one, order, 1)) for one in (numbers, scores)]
            return (
                Answers(*lists, None),
                [[u] if k else [] for u, k in zip(unit, known, strict=True)],
                torch.tensor(unit),
            )

        answers, right, _ = draw(np.random.default_rng(99), 60_000)
        own = torch.tensor([one[0] if one else -2 for one in right])
        hits = answers.works == own[:, None]
        total = int((own >= 0).sum())
        truth = {
            "GAP": global_average_precision(answers.confidence[:, 0], hits[:, 0], total),
            "microAP": global_average_precision(answers.confidence.flatten(), hits.flatten(), total),
        }
        held = dict.fromkeys(truth, 0)
        for seed in range(200):
            found = measure_photographs(*draw(np.random.default_rng(seed), works)).intervals
            for name, value in truth.items():
                held[name] += found[name][0] <= value <= found[name][1]
        assert min(held.values()) >= 182, held


class TestCommand:
    @pytest.fixture(scope="class")
    def asked(self, small_run, tmp_path_factory):
        """A catalog, and photographs of its items: 6 as they are, one twice as wide beside another, 2 strange ones."""
        folder = tmp_path_factory.mktemp("photographs")
        catalog = read_catalog(small_run / "catalog")
        names = catalog.items["path"].to_pylist()
        pictures = [decode_thumbnail(catalog.thumbnails([row])[0]).permute(1, 2, 0).numpy() for row in range(8)]
        lines = ["path,work,x,y,w,h,unit"]
        for row in range(6):
            Image.fromarray(pictures[row]).save(folder / f"{row}.png")
            lines.append(f"{row}.png,{names[row]},,,,,")
        height, width = pictures[6].shape[:2]
        Image.fromarray(np.concatenate([pictures[6], pictures[7]], axis=1)).save(folder / "two.png")
        lines += [f"two.png,{names[row]},{(row - 6) * width},0,{width},{height}," for row in (6, 7)]
        rng = np.random.default_rng(0)
        for name in ("strange", "other"):
            Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{name}.png")
            lines.append(f"{name}.png,{'' if name == 'other' else 'Guernica'},,,,,visit")
        return small_run / "catalog", table(folder / "photographs.csv", *lines), names

    def test_photographs_find_their_works(self, asked, tmp_path):
        catalog, photographs, names = asked
        given = ("photographs", f"catalog={catalog}", f"photographs={photographs}", "device=cpu")
        done = simsearch(*given, f"out={tmp_path / 'a'}")
        assert "1 works of the photographs are not in the catalog (Guernica)" in done.stderr
        about = json.loads((tmp_path / "a" / "metrics.json").read_text())["test"]
        assert (about["protocol"], about["unit"], about["units"]) == ("photographs", "work", 8)
        counts = {name: about["metrics"][name] for name in ("photographs", "matches", "no_match")}
        assert counts == {"photographs": 10, "matches": 8, "no_match": 2}
        assert about["metrics"]["R@1"] == 1.0
        assert set(about["intervals"]) == {"R@1", "R@5", "mAP@20_minRk", "GAP", "microAP"}  # it is not calibrated
        with (tmp_path / "a" / "per_query.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        paths = dict(zip(*(read_catalog(catalog).names.numbers.astype(str), names), strict=True))
        assert [paths[row["first"]] for row in rows[:8]] == names[:8]
        assert [row["rank"] for row in rows] == ["1"] * 8 + [""] * 2
        assert rows[8]["unit"] == rows[9]["unit"]
        assert rows[6]["unit"] == rows[7]["unit"]  # one photograph, of which two parts are asked about
        assert [row["x"] for row in rows[5:7]] == ["", "0.0"]

        done = simsearch(*given, f"out={tmp_path / 'b'}", f"against={tmp_path / 'a'}", "k=5")
        with (tmp_path / "b" / "paired.csv").open(newline="") as file:
            pairs = {row["metric"]: row for row in csv.DictReader(file)}
        assert set(pairs) == {"R@1", "R@5", "mAP@5_minRk", "GAP", "microAP"}
        assert all(float(row["difference"]) == 0 and float(row["p_holm"]) == 1 for row in pairs.values())
        assert json.loads((tmp_path / "b" / "metrics.json").read_text())["test"]["fingerprint"] == about["fingerprint"]

    def test_other_photographs_do_not_compare(self, asked, tmp_path):
        catalog, photographs, _ = asked
        fewer = table(photographs.parent / "fewer.csv", *photographs.read_text().splitlines()[:5])
        given = ("photographs", f"catalog={catalog}", "device=cpu")
        simsearch(*given, f"photographs={fewer}", f"out={tmp_path / 'a'}")
        done = simsearch(
            *given, f"photographs={photographs}", f"out={tmp_path / 'b'}", f"against={tmp_path / 'a'}", expect=1
        )
        assert "other photographs or other items do not compare" in done.stderr
        assert not (tmp_path / "b").exists()

    def test_photographs_of_no_work_need_a_catalog_that_says_no(self, asked, tmp_path):
        catalog, photographs, _ = asked
        none = table(photographs.parent / "none.csv", "path,work", "other.png,")
        given = ("photographs", f"catalog={catalog}", f"photographs={none}", "device=cpu", f"out={tmp_path / 'none'}")
        assert "simsearch calibrate" in simsearch(*given, expect=1).stderr

    def test_a_missing_file_is_named_before_the_work(self, asked, tmp_path):
        catalog, photographs, names = asked
        lacking = table(photographs.parent / "lacking.csv", "path,work", f"gone.png,{names[0]}")
        done = simsearch("photographs", f"catalog={catalog}", f"photographs={lacking}", f"out={tmp_path}", expect=1)
        assert "1 of 1 photographs are not in" in done.stderr
        (tmp_path / "file").touch()
        done = simsearch(
            "photographs", f"catalog={catalog}", f"photographs={photographs}", f"out={tmp_path}/file/a", expect=1
        )
        assert "give another out=" in done.stderr
        assert "photographs:" not in done.stderr.replace("simsearch photographs:", "")  # none was searched with


class TestNames:
    def test_a_work_is_named_by_its_column_or_by_an_item(self, small_run):
        engine = Engine(read_catalog(small_run / "catalog"))
        items = engine.catalog.items
        value = items[engine.work_attribute][3].as_py()
        path = items["path"][5].as_py()
        found = works_named(engine, [value, path, "Guernica"])
        assert found == {value: int(engine.works[3]), path: int(engine.works[5])}


class TestSimulator:
    @pytest.fixture(scope="class")
    def simulate(self):
        pytest.importorskip("cv2", reason="the simulator draws with OpenCV: NOT TESTED")
        spec = importlib.util.spec_from_file_location("simulate", SIMULATOR)
        module = importlib.util.module_from_spec(spec)
        sys.modules["simulate"] = module  # where dataclasses look
        spec.loader.exec_module(module)
        return module

    @pytest.fixture(scope="class")
    def art(self, tmp_path_factory):
        """40 works of smooth random colours, three images of which are of the same work."""
        folder = tmp_path_factory.mktemp("art")
        rng = np.random.default_rng(0)
        lines = ["image_path,title,group_id"]
        for row in range(42):
            small = Image.fromarray(rng.integers(0, 256, (8, 7, 3), dtype=np.uint8))
            small.resize((84, 96), Image.Resampling.BICUBIC).save(folder / f"{row}.png")
            lines.append(f'{row}.png,"A, {row}",g{max(row, 2)}')
        return table(folder / "art.csv", *lines)

    def run(self, simulate, monkeypatch, art: Path, out: Path, *more: str) -> None:
        given = ["simulate.py", "--art", str(art), "--out", str(out), "--size", "320", *more]
        monkeypatch.setattr(sys, "argv", given)
        simulate.main()

    def read(self, path: Path) -> list[dict[str, str]]:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def test_it_goes_on_and_gives_the_same_bytes(self, simulate, monkeypatch, art, tmp_path):
        self.run(simulate, monkeypatch, art, tmp_path / "a", "--count", "7")
        self.run(simulate, monkeypatch, art, tmp_path / "b", "--count", "4")
        (tmp_path / "b" / "facts" / "00002.json").unlink()
        (tmp_path / "b" / "photographs" / "00002.jpg").write_bytes(b"half")
        self.run(simulate, monkeypatch, art, tmp_path / "b", "--count", "7")
        files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
        assert len(files) == 7 + 7 + 5
        for name in files:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
        with pytest.raises(SystemExit, match="other photographs"):
            self.run(simulate, monkeypatch, art, tmp_path / "a", "--seed", "2")

    def test_works_are_apart_and_the_painting_is_where_the_table_says(self, simulate, monkeypatch, art, tmp_path):
        cv2 = pytest.importorskip("cv2")
        shown = {}
        for seed in (0, 1):
            out = tmp_path / str(seed)
            self.run(simulate, monkeypatch, art, out, "--count", "15", "--seed", str(seed))
            shown[seed] = self.read(out / "works.csv")
        left_out = {row["path"] for row in self.read(tmp_path / "0" / "left_out.csv")}
        assert left_out == {row["path"] for row in self.read(tmp_path / "1" / "left_out.csv")}
        kept = {row["image_path"] for row in self.read(tmp_path / "0" / "catalog.csv")}
        assert not kept & left_out
        assert len(kept | left_out) == 42
        assert not {row["unit"] for row in shown[0]} & {row["unit"] for row in shown[1]}
        for row in shown[0] + shown[1]:
            assert (row["work"] in left_out) == (row["known"] == "0")

        alike = []
        for half, row in [(seed, row) for seed, rows in shown.items() for row in rows]:
            if float(row["occluded"]) or float(row["glare"]):
                continue
            photograph = cv2.imread(str(tmp_path / str(half) / row["photograph"]))
            painting = cv2.imread(str(art.parent / row["work"]))
            height, width = painting.shape[:2]
            quad = np.float32([[row[f"x{i}"], row[f"y{i}"]] for i in range(1, 5)])
            flat = np.float32([[0, 0], [width, 0], [width, height], [0, height]])
            seen = cv2.warpPerspective(photograph, cv2.getPerspectiveTransform(quad, flat), (width, height))
            alike.append(np.corrcoef(seen[8:-8, 8:-8].ravel(), painting[8:-8, 8:-8].ravel())[0, 1])
        assert len(alike) >= 8
        assert min(alike) > 0.6, alike

    def test_a_photograph_of_two_works_has_two_rows(self, simulate, monkeypatch, art, tmp_path):
        self.run(simulate, monkeypatch, art, tmp_path, "--count", "15")
        asked = read_photographs(tmp_path / "photographs.csv")
        assert len(asked) == 15
        assert [len(one.works) for one in asked] == [1, 1, 0, 1, 1, 0, 2, 1, 0, 1, 1, 0, 1, 2, 0]
        listed = {}
        for row in self.read(tmp_path / "works.csv"):
            listed.setdefault(row["photograph"], []).append(row["work"] if row["known"] == "1" else None)
        for one in asked:
            assert [work for work in listed[one.path] if work] == list(one.works)
