"""Easy, hard and junk: the metric by hand and by a naive walk, the ground truth, hostile pickles, the commands."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import simsearch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

from simsearch import __main__ as program
from simsearch.data.revisited import (
    Benchmark,
    Query,
    convert_ground_truth,
    file_name,
    fingerprint,
    landmarks,
    load_gallery,
    load_queries,
    read_benchmark,
    write_benchmark,
)
from simsearch.functional.revisited import (
    SETUPS,
    listed_ranks,
    measure_revisited,
    precision_at_cutoff,
    ranks_without,
    trapezoid_average_precision,
)
from simsearch.images import ImageError


def ranks(*values: int) -> np.ndarray:
    return np.array(values)


class TestTrapezoid:
    """Ranks count from 0; each right item brings the mean of the precision before it and with it."""

    @pytest.mark.parametrize(
        ("found", "expected"),
        [
            ([0], 1),  # (1 + 1/1) / 2
            ([1], Fraction(1, 4)),  # (0/1 + 1/2) / 2
            ([3], Fraction(1, 8)),  # (0/3 + 1/4) / 2
            ([0, 1, 2], 1),  # before each: 1, 1/1, 2/2; with each: 1/1, 2/2, 3/3
            # item 0: (1 + 1) / 2 = 1; item 1: (1/2 + 2/3) / 2 = 7/12; mean 19/24
            ([0, 2], Fraction(19, 24)),
            # (0/1 + 1/2) / 2 = 1/4; (1/2 + 2/3) / 2 = 7/12; (2/5 + 3/6) / 2 = 9/20; mean 77/180
            ([1, 2, 5], Fraction(77, 180)),
        ],
    )
    def test_by_hand(self, found, expected):
        assert trapezoid_average_precision(ranks(*found)) == pytest.approx(float(expected), abs=1e-15)

    @given(st.sets(st.integers(0, 60), min_size=1))
    def test_lies_below_the_usual_average_precision_and_within_0_1(self, found):
        ordered = np.array(sorted(found))
        usual = np.mean([(j + 1) / (r + 1) for j, r in enumerate(ordered)])
        assert 0 < trapezoid_average_precision(ordered) <= usual + 1e-12 <= 1 + 1e-12

    def test_precision_is_clipped_at_the_last_right_item(self):
        found = ranks(0, 2)  # right, wrong, right, nothing right below
        assert precision_at_cutoff(found, 1) == 1
        assert precision_at_cutoff(found, 2) == 1 / 2
        assert precision_at_cutoff(found, 3) == 2 / 3
        assert precision_at_cutoff(found, 10) == 2 / 3  # of the first min(3, 10)
        assert precision_at_cutoff(ranks(0), 10) == 1

    def test_taking_items_out_moves_the_others_up(self):
        assert ranks_without(ranks(7, 3, 1), ranks(5, 0)).tolist() == [0, 2, 5]
        assert ranks_without(ranks(2), ranks()).tolist() == [2]


class TestSetups:
    """One query; gallery in the order of its ranking: junk hard wrong easy wrong junk hard easy."""

    QUERY, GALLERY = torch.ones(1, 1), torch.arange(8.0, 0, -1)[:, None]
    LISTS: ClassVar = {"easy": [[3, 7]], "hard": [[1, 6]], "junk": [[0, 5]]}

    @pytest.mark.parametrize(
        ("setup", "expected"),
        [
            # Left: wrong easy wrong easy, ranks 1 3. ((0 + 1/2) / 2 + (1/3 + 2/4) / 2) / 2 = (1/4 + 5/12) / 2
            ("easy", {"AP": Fraction(1, 3), "P@1": 0, "P@3": Fraction(1, 3), "P@10": Fraction(2, 4)}),
            # Left: hard wrong easy wrong hard easy, ranks 0 2 4 5.
            # 1, (1/2 + 2/3) / 2 = 7/12, (2/4 + 3/5) / 2 = 11/20, (3/5 + 4/6) / 2 = 19/30: mean 166/240
            ("medium", {"AP": Fraction(83, 120), "P@1": 1, "P@3": Fraction(2, 3), "P@10": Fraction(4, 6)}),
            # Left: hard wrong wrong hard, ranks 0 3. (1 + (1/3 + 2/4) / 2) / 2 = (1 + 5/12) / 2
            ("hard", {"AP": Fraction(17, 24), "P@1": 1, "P@3": Fraction(1, 3), "P@10": Fraction(2, 4)}),
        ],
    )
    def test_by_hand(self, setup, expected):
        values = measure_revisited(self.QUERY, self.GALLERY, **self.LISTS, ks=(1, 3, 10))
        got = {name.removeprefix(f"{setup}/"): v.item() for name, v in values.items() if name.startswith(setup)}
        assert got == pytest.approx({name: float(v) for name, v in expected.items()}, abs=1e-15)

    def test_nothing_right_is_nan_and_only_there(self):
        values = measure_revisited(self.QUERY, self.GALLERY, [[]], [[2]], [[]])
        assert {name for name, v in values.items() if v.isnan().any()} == {
            "easy/AP", "easy/P@1", "easy/P@5", "easy/P@10"
        }  # fmt: skip
        # Item 2 is at rank 2: (0/2 + 1/3) / 2.
        assert values["hard/AP"].item() == values["medium/AP"].item() == pytest.approx(1 / 6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"easy": [[8]]}, "position 8: there are 8"),
            ({"easy": [[-1]]}, "position -1"),
            ({"hard": [[3]]}, "twice"),
            ({"junk": []}, "1 queries and 0 lists of junk"),
            ({"ks": (0,)}, "k must be at least 1, got 0"),
            ({"query": torch.ones(1, 2)}, r"\(1, 2\)"),
            ({"query": torch.full((1, 1), torch.nan)}, "query descriptors hold NaN"),
            ({"gallery": torch.ones(0, 1)}, "nothing to rank"),
        ],
    )
    def test_wrong_arguments_are_named(self, change, message):
        arguments = {"query": self.QUERY, "gallery": self.GALLERY, **self.LISTS, "ks": (1,), **change}
        with pytest.raises(ValueError, match=message):
            measure_revisited(**arguments)


@st.composite
def graded_problems(draw):
    """Small whole numbers, so that scores are exact and tie often; random disjoint lists."""
    q, g, d = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    query, gallery = (torch.from_numpy(rng.integers(-2, 3, (n, d))).float() for n in (q, g))
    grades = rng.integers(0, 4, (q, g))
    return query, gallery, [[np.flatnonzero(row == grade).tolist() for row in grades] for grade in range(3)]


def naive(query, gallery, right, ignored, k):
    """Walks down one ranking and keeps the precision after every item."""
    scores = [sum(a * b for a, b in zip(query.tolist(), row.tolist(), strict=True)) for row in gallery]
    ranking = [i for _, i in sorted((-score, i) for i, score in enumerate(scores)) if i not in ignored]
    if not right:
        return None
    precision, hits, area = Fraction(1), 0, Fraction(0)
    at_k = None
    for depth, item in enumerate(ranking, start=1):
        hits += item in right
        now = Fraction(hits, depth)
        if item in right:
            area += (precision + now) / 2 / len(right)
        precision = now
        if at_k is None and (depth == k or hits == len(right)):
            at_k = now
    return float(area), float(at_k)


@settings(max_examples=150, deadline=None)
@given(graded_problems(), st.integers(1, 14), st.sampled_from([1, 200, 2**27]))
def test_agrees_with_a_naive_walk(problem, k, block_bytes):
    query, gallery, lists = problem
    values = measure_revisited(query, gallery, *lists, ks=(k,), block_bytes=block_bytes)
    for q in range(len(query)):
        easy, hard, junk = (set(grade[q]) for grade in lists)
        for setup, right, ignored in (
            ("easy", easy, hard | junk), ("medium", easy | hard, junk), ("hard", hard, easy | junk)
        ):  # fmt: skip
            expected = naive(query[q], gallery, right, ignored, k)
            got = [values[f"{setup}/AP"][q].item(), values[f"{setup}/P@{k}"][q].item()]
            if expected is None:
                assert np.isnan(got).all()
            else:
                assert got == pytest.approx(expected, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(graded_problems())
def test_ranks_are_those_of_a_stable_argsort(problem):
    query, gallery, _ = problem
    everything = np.arange(len(gallery))
    for row, got in zip(query @ gallery.T, listed_ranks(query, gallery, [everything] * len(query)), strict=True):
        assert np.array_equal(got[np.argsort(-row.numpy(), kind="stable")], everything)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("queries", "d", "items"), [(1, 64, 2047), (3, 512, 2047), (5, 8, 33), (9, 100, 500)])
def test_equal_descriptors_rank_by_position_wherever_they_stand(queries, d, items, threads):
    """Every item comes many times; matrix kernels round the last columns, and blocks of few rows, differently."""
    rng = torch.Generator().manual_seed(5)
    distinct = torch.nn.functional.normalize(torch.randn(20, d, generator=rng))
    gallery = distinct.repeat(-(-items // 20), 1)[:items]
    query = torch.nn.functional.normalize(torch.randn(queries, d, generator=rng))
    order = np.stack([np.argsort(-row, kind="stable") for row in (query.double() @ distinct.double().T).numpy()])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for block_bytes in (1, 8 * items * 3, 2**27):
            everything = [np.arange(items)] * queries
            for row, ranks in zip(
                order, listed_ranks(query, gallery, everything, block_bytes=block_bytes), strict=True
            ):
                expected = np.concatenate([np.arange(one, items, 20) for one in row])
                assert np.array_equal(np.argsort(ranks), expected)
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------- ground truth

IMAGES = ("a_000", "b_001", "c_002.png", "d_003", "e_004")
QUERIES = (
    Query("q_0", (1.5, 2.0, 30.0, 40.25), (0, 2), (1,), (4,)),
    Query("q_1.PNG", None, (), (3,), ()),
)
BENCHMARK = Benchmark("toy", IMAGES, QUERIES)


def layout(number=int, array=list, box=list) -> dict:
    """BENCHMARK as the authors lay it out, in the number and list types wanted."""
    gnd = [
        {
            "bbx": None if query.bbx is None else box(query.bbx),
            **{grade: array([number(i) for i in getattr(query, grade)]) for grade in ("easy", "hard", "junk")},
        }
        for query in QUERIES
    ]
    return {"gnd": gnd, "imlist": list(IMAGES), "qimlist": [query.image for query in QUERIES]}


def int_array(values):
    return np.array(values, np.int64)


LAYOUTS = {
    "python": layout(),
    "tuples": layout(array=tuple, box=tuple),
    "scalars": layout(number=np.int64, box=lambda box: [np.float64(x) for x in box]),
    "arrays": layout(array=int_array, box=np.array),
    "small-arrays": layout(array=lambda v: np.array(v, np.uint16), box=lambda b: np.array(b, np.float32)),
    "big-endian": layout(array=lambda v: np.array(v, ">i4")),
    "strided": layout(array=lambda v: np.repeat(int_array(v), 2)[::2]),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", LAYOUTS)
def test_pickles_of_every_protocol_convert(kind, protocol, tmp_path):
    path = tmp_path / "gnd_toy.pkl"
    path.write_bytes(pickle.dumps(LAYOUTS[kind], protocol=protocol))
    assert convert_ground_truth(path, "toy") == BENCHMARK


@pytest.mark.parametrize("protocol", [0, 2])
def test_pickles_of_older_numpy_convert(protocol, tmp_path):
    path = tmp_path / "gnd_toy.pkl"
    data = pickle.dumps(LAYOUTS["arrays"], protocol=protocol)
    path.write_bytes(data.replace(b"numpy._core.", b"numpy.core."))
    assert convert_ground_truth(path, "toy") == BENCHMARK


def test_deep_nesting_is_no_crash(tmp_path):
    path = tmp_path / "deep.pkl"
    path.write_bytes(b"]" * 100_000 + b"a" * 99_999 + b".")
    with pytest.raises(ValueError, match="must have the keys gnd, imlist, qimlist"):
        convert_ground_truth(path, "deep")


def test_arrays_of_several_dimensions_are_no_lists(tmp_path):
    value = layout()
    value["gnd"][0]["easy"] = np.ones((2, 2), np.int64)
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match="query 0, easy: it must be a list, got a ndarray"):
        convert_ground_truth(path, "toy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("qimlist"), "the file does not have qimlist"),
        (lambda v: v["qimlist"].pop(), "gnd has 2 queries, but qimlist has 1"),
        (lambda v: v["gnd"][1].pop("easy"), "gnd of query 1 does not have easy"),
        (lambda v: v["gnd"][0].update(easy=[[1]]), "query 0, easy: .* positions in images, got a list"),
        (lambda v: v["gnd"][0].update(easy=3), "query 0, easy: it must be a list, got a int"),
        (lambda v: v["imlist"].append(7), "image 5: it must be a string"),
    ],
)
def test_incomplete_pickles_say_what_is_missing(change, message, tmp_path):
    value = layout()
    change(value)
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match=message):
        convert_ground_truth(path, "toy")


class TestFormat:
    def test_round_trip(self, tmp_path):
        write_benchmark(tmp_path / "toy.json", BENCHMARK)
        assert read_benchmark(tmp_path / "toy.json") == BENCHMARK
        assert BENCHMARK.listed("easy") == [(0, 2), ()]
        assert BENCHMARK.gallery(tmp_path).paths == ("a_000.jpg", "b_001.jpg", "c_002.png", "d_003.jpg", "e_004.jpg")
        assert [file_name(n) for n in ("x", "x.v2", "x.JPEG")] == ["x.jpg", "x.v2.jpg", "x.JPEG"]

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("images",), [], "0 images"),
            (("queries",), [], "0 queries"),
            (("images", 1), "a_000", "images, row 2: .* already in row 1"),
            (("images", 1), "a_000.jpg", "images, row 2: .* already in row 1"),
            (("images", 1), "../b", "leaves the root by"),
            (("images", 1), 3, "image 1: it must be a string"),
            (("name",), "", "name: it must be a string"),
            (("queries", 0, "image"), "/etc/q", r"query 0 \(/etc/q\).*absolute"),
            (("queries", 0, "image"), "b_001", "image 1 of the gallery too"),
            (("queries", 0, "easy"), [0, 5], r"query 0 \(q_0\) lists image 5: there are 5"),
            (("queries", 0, "easy"), [-1], "lists image -1"),
            (("queries", 0, "easy"), [True], "positions in images, got a bool"),
            (("queries", 0, "easy"), [1.0], "positions in images, got a float"),
            (("queries", 0, "easy"), [0, 0], "image 0 is listed twice as easy"),
            (("queries", 0, "easy"), [4], "image 4 is listed as easy and as junk"),
            (("queries", 0, "bbx"), [1, 2, 3], "got 3 numbers"),
            (("queries", 0, "bbx"), [3, 2, 3, 4], "x1 < x2"),
            (("queries", 0, "bbx"), [-5, 2, 3, 4], "0 <= x1"),
            (("queries", 0, "bbx"), [1, 2, 3, float("nan")], "bbx"),
            (("queries", 0, "bbx"), [1, 2, 3, "4"], "bbx: it must hold pixel coordinates"),
            (("queries", 0), [], "query 0 must have the keys"),
            ((), 3, "is not a mapping"),
        ],
    )
    def test_wrong_content_is_named(self, path, value, message, tmp_path):
        content = json.loads(json.dumps({"b": json.loads(_as_json())}))
        node, keys = content, ("b", *path)
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
        file = tmp_path / "toy.json"
        file.write_text(json.dumps(content["b"]))
        with pytest.raises(ValueError, match=message) as caught:
            read_benchmark(file)
        assert str(file) in str(caught.value)

    def test_files_that_are_no_json(self, tmp_path):
        for name, data, message in (
            ("a.pkl", pickle.dumps(layout()), "simsearch data convert gnd="),
            ("a.json", b"{", "is not JSON"),
            ("a.json", b"[" * 100_000, "is not JSON"),
        ):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(ValueError, match=message):
                read_benchmark(tmp_path / name)

    def test_a_query_in_the_gallery_may_be_its_own_junk(self):
        query = Query("b_001", None, (0,), (), (1,))
        assert Benchmark("toy", IMAGES, (query,)).queries == (query,)


def _as_json() -> str:
    return json.dumps({"name": "toy", "images": IMAGES, "queries": [asdict(query) for query in QUERIES]})


# ---------------------------------------------------------------------------------- images and commands

SIDE = 48


def pattern(seed: int) -> np.ndarray:
    """A picture of large blocks, unlike those of other seeds."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return blocks.repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)


@pytest.fixture(scope="module")
def oxford(tmp_path_factory) -> Path:
    """A folder in the authors' layout: jpg/ and gnd_toy.pkl.

    Eight gallery pictures. Query i shows picture i within its box, on a ground of other pictures. Files are
    PNG by content: the ending says nothing.
    """
    root = tmp_path_factory.mktemp("toy")
    (root / "jpg").mkdir()
    for i in range(8):
        Image.fromarray(pattern(i)).save(root / "jpg" / f"image_{i}.jpg", "PNG")
    gnd = []
    for i in range(3):
        canvas = np.tile(pattern(7 - i), (3, 4, 1))
        canvas[30 : 30 + SIDE, 60 : 60 + SIDE] = pattern(i)
        Image.fromarray(canvas).save(root / "jpg" / f"query_{i}.jpg", "PNG")
        box = np.array([60.2, 29.9, 59.8 + SIDE, 30 + SIDE])
        gnd.append({"bbx": box, "easy": int_array([i]), "hard": int_array([3, 4][:i]), "junk": int_array([7 - i])})
    truth = {
        "gnd": gnd,
        "imlist": [f"image_{i}" for i in range(8)],
        "qimlist": [f"query_{i}" for i in range(3)],
    }
    (root / "gnd_toy.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    return root


def test_queries_are_cropped_and_the_gallery_is_whole(oxford):
    benchmark = convert_ground_truth(oxford / "gnd_toy.pkl", "toy")
    ((queries, _),) = load_queries(benchmark, oxford / "jpg", size=SIDE)
    images, positions = zip(*load_gallery(benchmark, oxford / "jpg", size=SIDE, batch_size=3), strict=True)
    gallery = torch.cat(images)
    assert torch.cat(positions).tolist() == list(range(8))
    assert queries.shape == (3, 3, SIDE, SIDE)
    assert torch.equal(queries, gallery[:3])
    assert torch.equal(gallery[7], torch.from_numpy(pattern(7)).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("box", "message"),
    [((0, 0, 300, 20), "192 x 144 pixels"), ((200, 0, 250, 20), "192 x 144"), ((0.1, 0.1, 0.2, 0.2), "is not inside")],
)
def test_boxes_that_do_not_fit_their_image_are_refused(box, message, oxford):
    benchmark = Benchmark("toy", ("image_0",), (Query("query_0", box, (0,), (), ()),))
    with pytest.raises(ValueError, match=message):
        next(load_queries(benchmark, oxford / "jpg", size=8))


def test_boxes_may_reach_a_pixel_beyond(oxford):
    whole = Benchmark("toy", ("image_0",), (Query("query_0", None, (0,), (), ()),))
    beyond = Benchmark("toy", ("image_0",), (Query("query_0", (-0.6, -0.9, 193, 144.9), (0,), (), ()),))
    (first, _), (second, _) = (next(load_queries(b, oxford / "jpg", size=16)) for b in (whole, beyond))
    assert torch.equal(first, second)


def test_unreadable_images_are_errors_and_not_left_out(oxford, tmp_path):
    for path in (oxford / "jpg").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    benchmark = convert_ground_truth(oxford / "gnd_toy.pkl", "toy")
    before = fingerprint(benchmark, tmp_path)
    assert before == fingerprint(benchmark, oxford / "jpg")
    for name, load in (("image_5.jpg", load_gallery), ("query_1.jpg", load_queries)):
        (tmp_path / name).write_bytes(b"no picture")
        with pytest.raises(ImageError, match=name):
            list(load(benchmark, tmp_path, size=8, workers=1))
    assert fingerprint(benchmark, tmp_path) != before
    (tmp_path / "image_2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 11 files .* first image_2.jpg"):
        fingerprint(benchmark, tmp_path)


@pytest.fixture
def _commands(monkeypatch):
    monkeypatch.setitem(program.COMMANDS, "data convert", "")
    monkeypatch.setitem(program.COMMANDS, "instance", "")


@pytest.mark.usefixtures("_commands")
class TestCommands:
    def test_convert_then_measure(self, oxford, small_run, tmp_path):
        truth, folder = tmp_path / "toy.json", tmp_path / "results"
        done = simsearch("data", "convert", f"gnd={oxford / 'gnd_toy.pkl'}", f"out={truth}")
        assert "toy: 3 queries, 8 images, 3 easy, 3 hard, 3 junk" in done.stdout
        arguments = (f"run={small_run}", f"gnd={truth}", f"images={oxford / 'jpg'}", f"run_dir={folder}", "workers=0")
        done = simsearch("instance", *arguments)
        for word in ("Easy", "Medium", "Hard", "mAP", "mP@10", "toy"):
            assert word in done.stdout
        about = json.loads((folder / "metrics.json").read_text())["test"]
        metrics = about["metrics"]
        # The crop of query i is picture i to the pixel: nothing ranks above it.
        assert metrics["easy/mAP"] == metrics["easy/mP@1"] == metrics["medium/mP@1"] == 1
        assert 0 < metrics["hard/mAP"] < 1
        assert (metrics["queries"], metrics["gallery"], metrics["bytes_per_item"]) == (3, 8, 64)
        assert metrics["hard/queries_without_relevant"] == 1
        # Queries 1 and 2 both list picture 3: two landmarks, all right.
        assert (about["unit"], about["units"]) == ("landmark", 2)
        assert about["intervals"]["easy/mAP"] == pytest.approx(binomtest(2, 2).proportion_ci(), abs=1e-9)
        assert "by landmark: 2" in done.stdout
        assert about["fingerprint"] == fingerprint(read_benchmark(truth), oxford / "jpg")
        table = pq.read_table(folder / "per_query.parquet")
        assert table["image"].to_pylist() == ["query_0", "query_1", "query_2"]
        assert table["unit"].to_pylist() == [0, 1, 1]
        for name in (f"{setup}/AP" for setup in SETUPS):
            mean = np.nanmean(table[name].to_numpy())
            assert mean == pytest.approx(metrics[name.replace("AP", "mAP")], abs=1e-12)
        assert table.schema.metadata[b"protocol"] == b"toy"

    def test_a_setup_without_relevant_items_has_no_number(self, oxford, small_run, tmp_path):
        benchmark = Benchmark("one", ("image_0", "image_1"), (Query("query_0", None, (0,), (), ()),))
        write_benchmark(tmp_path / "one.json", benchmark)
        simsearch(
            "instance", f"run={small_run}", f"gnd={tmp_path / 'one.json'}", f"images={oxford / 'jpg'}",
            f"run_dir={tmp_path}", "workers=0", "ks=[2]",
        )  # fmt: skip
        text = (tmp_path / "metrics.json").read_text()
        about = json.loads(text)["test"]
        assert about["metrics"]["hard/mAP"] is None
        assert "hard/mAP" not in about["intervals"]
        assert about["metrics"]["easy/mP@2"] in (0.5, 1.0)
        assert "NaN" not in text

    def test_mistakes_end_in_one_clear_line(self, oxford, small_run, tmp_path):
        evil = tmp_path / "gnd_evil.pkl"
        evil.write_bytes(f"cos\nmkdir\n(V{tmp_path / 'mark'}\ntR.".encode())
        done = simsearch("data", "convert", f"gnd={evil}", expect=1)
        assert "mkdir, which is refused" in done.stderr
        assert not (tmp_path / "mark").exists()
        assert not (tmp_path / "gnd_evil.json").exists()
        pickled = oxford / "gnd_toy.pkl"
        done = simsearch("instance", f"run={small_run}", f"gnd={pickled}", f"images={oxford}", expect=1)
        assert "simsearch data convert gnd=" in done.stderr
        write_benchmark(tmp_path / "toy.json", convert_ground_truth(pickled, "toy"))
        done = simsearch("instance", f"run={small_run}", f"gnd={tmp_path / 'toy.json'}", f"images={oxford}", expect=1)
        assert "11 of 11 files are not in" in done.stderr
        arguments = (f"run={small_run}", f"gnd={tmp_path / 'toy.json'}", f"images={oxford / 'jpg'}")
        for ks in ("5", "[0]", "[]"):
            done = simsearch("instance", *arguments, f"ks={ks}", "workers=0", expect=1)
            assert "ks must be a list of ranks from 1" in done.stderr
            assert "queries" not in done.stderr  # nothing was described
        done = simsearch("instance", *arguments, f"run_dir={evil}/a", "workers=0", expect=1)  # in a file
        assert "give another run_dir=" in done.stderr
        assert "queries" not in done.stderr
        assert "Traceback" not in done.stderr


SOME = st.sets(st.integers(0, 12), max_size=3), st.sets(st.integers(13, 25), max_size=3)


@given(st.lists(st.tuples(*SOME), min_size=1, max_size=20))
def test_queries_that_share_an_image_over_others_show_one_landmark(listed):
    """Against a flood over shared images by hand; junk shares nothing."""
    queries = tuple(Query(f"q{i}", None, tuple(e), tuple(h), (30,)) for i, (e, h) in enumerate(listed))
    benchmark = Benchmark("toy", tuple(f"image_{i}" for i in range(31)), queries)
    expected = []
    for start in range(len(listed)):
        met, waiting = set(), [start]
        while waiting:
            met.add(now := waiting.pop())
            shown = set().union(*listed[now])
            waiting += [i for i in range(len(listed)) if i not in met and shown & set().union(*listed[i])]
        expected.append(min(met))
    assert landmarks(benchmark).tolist() == expected
