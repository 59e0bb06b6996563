"""Near-duplicates at ingest that geometry verifies, and the decisions of a person on them."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import simsearch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from simsearch.commands import data_ingest
from simsearch.data.ingest.decisions import COLUMNS, Decisions, group_rows, read_decisions
from simsearch.data.ingest.grouping import Evidence, agreement, cliques, connected, is_weak
from simsearch.files import write_csv
from simsearch.functional.ragged import ragged

SAMPLE = 2  # images that are described to name the algorithm


def painting(seed: int) -> Image.Image:
    """Random shapes with many corners."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (240, 200), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(70):
        corners = (rng.uniform(-20, 20, (4, 2)) + rng.uniform((0, 0), (240, 200))).ravel().tolist()
        draw.polygon(corners, fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def page(seed: int) -> Image.Image:
    """A page of words under a heading that all pages share."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (200, 256), (250, 248, 240))
    draw = ImageDraw.Draw(image)
    draw.text((20, 4), "CHRONICLE", fill=(20, 20, 20), font=ImageFont.load_default(size=24))
    for line in range(15):
        text = " ".join("".join(rng.choice(list("aeinorstlm"), rng.integers(2, 9))) for _ in range(6))
        draw.text((10, 36 + 14 * line), text, fill=(30, 30, 30), font=ImageFont.load_default(size=11))
    return image


def tensors(pictures: list[Image.Image]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(one)).permute(2, 0, 1).contiguous() for one in pictures]


def candidates(pairs: list[tuple[int, int]], correlation: list[float]) -> Evidence:
    none = torch.zeros(len(pairs), dtype=torch.int64)
    values = torch.tensor(correlation)
    return Evidence(torch.tensor(pairs), values, none, none, none.float(), none.float(), none.float(), values >= 0.7)


def asked(folder: Path, pictures: list[Image.Image], known: Evidence, chunk: int = 3) -> Evidence:
    files = SimpleNamespace(sha256=tuple(f"{number:064x}" for number in range(len(pictures))))
    return data_ingest.verified(folder, files, ragged(tensors(pictures)), known, chunk)  # type: ignore[arg-type]


def test_geometry_confirms_copies_and_refuses_what_only_looks_alike(tmp_path):
    own = painting(0)
    framed = Image.new("RGB", (300, 260), (90, 60, 30))
    framed.paste(own, (30, 30))
    plain = Image.new("RGB", (120, 90), (200, 190, 180))  # no features: its pixels decide
    copies = [
        own.rotate(20, Image.Resampling.BICUBIC, expand=True),
        own.crop((36, 30, 240, 200)),
        framed,
        own.transpose(Image.Transpose.ROTATE_90),
        own.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    ]
    pictures = [own, *copies, painting(1), page(0), page(1), plain, plain.crop((0, 0, 110, 90))]
    pairs = [(0, i) for i in range(1, 7)] + [(7, 8), (9, 10)]
    # Pixels agree on the mirrored copy and on the plain pictures, and nearly on the pages of one heading.
    found = asked(tmp_path, pictures, candidates(pairs, [0.0, 0.0, 0.0, 0.0, 0.9, 0.1, 0.6, 0.9]))
    assert found.same.tolist() == [True] * 5 + [False, False, True]
    assert found.features[-1] == 0
    assert (found.inliers[:5] >= 8).all()
    assert (found.aligned[:5] > 0.7).all()
    assert (found.support[:5] > 0.15).all()


def test_an_interrupted_verification_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    own = painting(3)
    pictures = [own, own.rotate(10), painting(4), painting(5), painting(5).rotate(-7)]
    known = candidates([(0, 1), (0, 2), (1, 2), (2, 3), (3, 4)], [0.0] * 5)
    whole = asked(tmp_path / "whole", pictures, known, chunk=2)
    assert whole.same.tolist() == [True, False, False, False, True]
    described = data_ingest.Sift.describe
    calls: list[int] = []

    def interrupted(self, image, **settings):
        calls.append(1)
        if len(calls) == SAMPLE + 4:
            raise KeyboardInterrupt
        return described(self, image, **settings)

    monkeypatch.setattr(data_ingest.Sift, "describe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asked(tmp_path / "killed", pictures, known, chunk=2)
    found = asked(tmp_path / "killed", pictures, known, chunk=2)
    assert len(calls) == SAMPLE + 4 + SAMPLE + 3  # the first piece of two images was there
    for name in ("features", "inliers", "share", "aligned", "support", "same"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    damaged = sorted((tmp_path / "killed").glob("*/*.npy"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert torch.equal(asked(tmp_path / "killed", pictures, known, chunk=2).inliers, whole.inliers)


@pytest.mark.parametrize(
    ("changed", "value", "described"),
    [
        ("functional.sift._SCALE", 128.0, 2),  # coarser descriptors: everything anew
        ("functional.sift._CANDIDATES", 1, 2),  # other features
        ("functional.geometry._MOST_STRETCH", 1.0, 0),  # another rule of matching: features stay
        ("commands.data_ingest.INLIERS", 9, 0),
    ],
)
def test_what_an_earlier_algorithm_stored_is_not_used(changed, value, described, tmp_path, monkeypatch):
    pictures, known = [painting(3), painting(3).rotate(10)], candidates([(0, 1)], [0.0])
    asked(tmp_path, pictures, known)
    before = set(tmp_path.glob("*"))
    asked(tmp_path, pictures, known)
    assert set(tmp_path.glob("*")) == before  # the same algorithm
    monkeypatch.setattr(f"simsearch.{changed}", value)
    calls: list[int] = []
    describe = data_ingest.Sift.describe
    monkeypatch.setattr(data_ingest.Sift, "describe", lambda *a, **b: calls.append(1) or describe(*a, **b))
    asked(tmp_path, pictures, known)
    assert len(calls) == SAMPLE + described
    assert len(set(tmp_path.glob("*")) - before) == (2 if described else 1)


@given(st.integers(2, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_the_pairs_of_a_group_are_those_of_a_loop(count, draw):
    pair = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda p: p[0] < p[1])
    pairs = draw.draw(st.lists(pair, unique=True, min_size=1, max_size=30))
    group = draw.draw(st.lists(st.integers(0, count - 1), unique=True))
    expected = [place for place, (one, other) in enumerate(pairs) if one in group and other in group]
    assert candidates(pairs, [0.0] * len(pairs)).within(group) == expected


@pytest.mark.parametrize(
    ("correlation", "features", "inliers", "share", "aligned", "support", "same"),
    [
        (0.99, 300, 7, 0.5, 0.9, 0.5, False),  # pixels do not speak where geometry can
        (0.0, 300, 8, 0.5, 0.6, 0.1, True),
        (0.0, 300, 40, 0.01, 0.9, 0.5, False),  # a heading
        (0.0, 300, 40, 0.5, 0.3, 0.5, False),  # scattered words
        (0.94, 300, 23, 0.6, 0.86, 0.08, False),  # coins of one rim
        (0.8, 19, 0, 0.0, 0.0, 0.0, True),
        (0.6, 19, 19, 0.9, 0.9, 0.9, False),
    ],
)
def test_what_decides(correlation, features, inliers, share, aligned, support, same):
    values = [torch.tensor([value]) for value in (correlation, features, inliers, share, aligned, support)]
    assert agreement(torch.tensor([[0, 1]]), *values).tolist() == [same]


@given(st.integers(2, 8), st.data())
@settings(max_examples=60, deadline=None)
def test_decisions_hold_whatever_the_pairs_say(count, draw):
    pair = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda p: p[0] < p[1])
    pairs = draw.draw(st.lists(pair, unique=True, max_size=20))
    confirmed = draw.draw(st.lists(pair, unique=True, max_size=4))
    tied = connected(count, confirmed)
    cut = [p for p in draw.draw(st.lists(pair, unique=True, max_size=6)) if tied[p[0]] != tied[p[1]]]
    root = cliques(count, pairs, confirmed, cut)
    assert all(root[a] == root[b] for a, b in confirmed)
    assert all(root[a] != root[b] for a, b in cut)


def test_a_group_is_weak_by_one_doubtful_pair_that_nobody_confirmed():
    many = torch.full((3,), 50)
    inliers = torch.tensor([40, 12, 3])
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5]])
    evidence = Evidence(pairs, many.float(), many, inliers, many.float(), many.float(), many.float(), inliers >= 8)
    assert [is_weak(group, evidence) for group in ([0, 1], [2, 3], [0, 1, 4, 5])] == [False, True, True]
    assert not is_weak([2, 3], evidence, [(2, 3)])


def test_the_table_of_groups_is_read_back_with_its_decisions(tmp_path):
    paths = ["=a.jpg", "b, c.jpg", "d.jpg", "e.jpg", "f.jpg"]  # a spreadsheet would take the first for a formula
    evidence = candidates([(0, 1), (0, 2), (1, 2), (3, 4)], [0.9, 0.8, 0.1, 0.9])
    known = Decisions([(0, 1)], [(0, 2), (2, 4)])  # the last is in no group
    write_csv(tmp_path / "groups.csv", COLUMNS, group_rows([("large", [0, 1, 2])], evidence, paths, known))
    with (tmp_path / "groups.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["why"], line["same"], line["decision"]) for line in lines] == [
        ("large", "yes", "confirm"),
        ("large", "yes", "cut"),
        ("large", "no", ""),
        ("decided", "", "cut"),
    ]
    assert read_decisions(tmp_path / "groups.csv", paths) == known


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("path_a,path_b\na,b", "no column 'decision'"),
        ("path_a,path_b,decision\na,b,yes", "row 1: the decision is 'yes': write confirm, cut or nothing"),
        ("path_a,path_b,decision\na,b,\na,x,cut", "row 2: 'x' is no decoded image"),
        ("path_a,path_b,decision\na,a,cut", "row 1: both paths are 'a'"),
        ("path_a,path_b,decision\na,b,cut\nb,a,confirm", "row 2: 'b' and 'a' were decided otherwise before"),
        ("path_a,path_b,decision\na,b,confirm\nb,c,Confirm\na,c,cut", "'a' and 'c' are cut, but confirmed pairs"),
        ("path_a,path_b,decision\na,b,confirm\na, b,c,cut", r"cannot be read \(line 3: 4 values for 3 columns\)"),
    ],
)
def test_a_bad_table_of_decisions_is_named_with_its_row(lines, message, tmp_path):
    (tmp_path / "d.csv").write_text(lines)
    with pytest.raises(ValueError, match=message):
        read_decisions(tmp_path / "d.csv", ["a", "b", "c"])


def test_a_person_confirms_and_cuts_groups(tmp_path):
    for number in range(3):
        (tmp_path / "art").mkdir(exist_ok=True)
        painting(7).save(tmp_path / "art" / f"same{number}.jpg", quality=80 + number)
        painting(50 + number).save(tmp_path / "art" / f"other{number}.png")
    out = tmp_path / "out"
    say = ("data", "ingest", f"images={tmp_path / 'art'}", f"out={out}", "near.descriptors=false", "workers=1")
    assert "6 images of 6 works" in simsearch(*say, "near.largest=2").stdout
    with (out / "groups.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["path_a"], line["path_b"]) for line in lines] == [
        ("same0.jpg", "same1.jpg"),
        ("same0.jpg", "same2.jpg"),
        ("same1.jpg", "same2.jpg"),
    ]
    lines[0]["decision"], lines[1]["decision"] = "confirm", "cut"
    write_csv(tmp_path / "mine.csv", list(lines[0]), [list(line.values()) for line in lines])
    said = simsearch(*say, "near.largest=2", f"decisions={tmp_path / 'mine.csv'}").stdout
    assert "6 images of 5 works" in said
    with (out / "groups.csv").open(newline="") as file:
        assert [line["decision"] for line in csv.DictReader(file)].count("cut") == 1  # no decision is lost


def test_a_cut_that_a_column_undoes_is_told():
    kept = SimpleNamespace(places=(0, 1, 3), columns={"work": ("a", "a", "b")})
    assert data_ingest.still_tied(kept, [(0, 1), (0, 2), (0, 3), (2, 4)]) == [(0, 1)]
