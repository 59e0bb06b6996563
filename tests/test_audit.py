"""The leak audit: hashes, near pairs against brute force, planted duplicates, files."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import imagehash
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from simsearch.data import near_duplicates as module
from simsearch.data.audit import (
    COLUMNS,
    Duplicates,
    audit,
    contact_sheet,
    estimated_precision,
    read_duplicates,
    write_duplicates,
)
from simsearch.data.collection import Collection
from simsearch.data.near_duplicates import MIN_CORRELATION, hash_pairs_between, perceptual_hashes, pixel_correlations
from simsearch.data.protocols import drop_rows
from simsearch.functional.ragged import ragged
from simsearch.types import RetrievalTask

ORIGINALS = 40
EDITS = ("copy", "jpeg", "brightness", "shift", "mirror")
NONE = Duplicates(
    torch.empty(0, dtype=torch.int64),
    torch.empty(0, dtype=torch.int64),
    torch.empty(0),
    torch.empty(0),
    torch.empty(0, dtype=torch.int64),
    (),
    (),
)


def pictures(count: int, seed: int = 0) -> Tensor:
    """Blocks of four sizes in random colours, uint8 (count, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    values = 128 + 40 * torch.randn(count, 3, 1, 1, generator=generator)
    for cells in (2, 4, 8, 16):
        blocks = torch.randn(count, 3, cells, cells, generator=generator)
        values = values + 25 * blocks.repeat_interleave(32 // cells, 2).repeat_interleave(32 // cells, 3)
    return values.round().clamp(0, 255).byte()


def edited(image: Tensor, edit: str) -> Tensor:
    if edit == "copy":
        return image.clone()
    if edit == "jpeg":
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=75)
        return torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)
    if edit == "brightness":
        return (image.float() * 1.15 + 10).round().clamp(0, 255).byte()
    if edit == "shift":
        return torch.cat([image[:, :, :1], image[:, :, :-1]], dim=2)
    return image.flip(2)


def colour_histograms(images: Tensor) -> Tensor:
    """Descriptors float32 (N, 216) that see colours and not places."""
    binned = (images.long() * 6 // 256).flatten(2)
    cell = binned[:, 0] * 36 + binned[:, 1] * 6 + binned[:, 2]
    return F.normalize(F.one_hot(cell, 216).sum(1).float(), dim=1)


@pytest.fixture(scope="module")
def planted() -> tuple[Tensor, RetrievalTask, Tensor]:
    """Images, task and training rows: originals; edits of the first five and five strangers search them."""
    originals = pictures(ORIGINALS)
    edits = torch.stack([edited(originals[i], edit) for i, edit in enumerate(EDITS)])
    strangers = pictures(5, seed=1)
    rows = torch.arange(ORIGINALS + 10)
    return torch.cat([originals, edits, strangers]), task(rows[ORIGINALS:], rows[:ORIGINALS]), rows[:ORIGINALS]


def task(query: Tensor, gallery: Tensor) -> RetrievalTask:
    return RetrievalTask("planted", query, gallery, "class", None, False, "0" * 16)


def pair_set(found: Duplicates) -> set[tuple[int, int]]:
    return set(zip(found.query.tolist(), found.other.tolist(), strict=True))


def test_the_hash_is_imagehash_phash_packed_bit_by_bit() -> None:
    images = pictures(6)
    hashes = perceptual_hashes(images)
    assert hashes.dtype == torch.uint8
    assert hashes.shape == (6, 8)
    for image, packed in zip(images, hashes.tolist(), strict=True):
        text = str(imagehash.phash(Image.fromarray(image.permute(1, 2, 0).numpy())))  # first bit first
        assert "".join(f"{byte:08b}"[::-1] for byte in packed) == f"{int(text, 16):064b}"
    assert perceptual_hashes(images[:0]).shape == (0, 8)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=9),
    st.lists(st.integers(0, 2**64 - 1), max_size=9),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2**8 - 1)), max_size=6),
    st.integers(0, 64),
    st.integers(1, 100),
)
def test_hash_pairs_are_those_of_brute_force_whatever_the_block(
    query: list[int], other: list[int], near: list[tuple[int, int]], max_distance: int, cells: int
) -> None:
    other = other + [query[i] ^ flips for i, flips in near if i < len(query)]
    found = hash_pairs_between(packed(query), packed(other), max_distance, cells=cells)
    expected = [
        (i, j, (a ^ b).bit_count())
        for i, a in enumerate(query)
        for j, b in enumerate(other)
        if (a ^ b).bit_count() <= max_distance
    ]
    assert all(column.dtype == torch.int64 for column in found)
    assert list(zip(*(column.tolist() for column in found), strict=True)) == expected


def packed(words: list[int]) -> Tensor:
    return torch.tensor([list(word.to_bytes(8, "little")) for word in words], dtype=torch.uint8).view(-1, 8)


def audited(*arguments: object, **more: object) -> Duplicates:
    images = arguments[0]
    return audit(*arguments, torch.arange(len(images)), **more)[0]  # type: ignore[arg-type]


def test_hash_proposes_copy_reencoding_and_brightness_but_no_mirror(
    planted: tuple[Tensor, RetrievalTask, Tensor],
) -> None:
    images, query_task, train = planted
    found = audited(images, None, query_task, train)
    sure = {(ORIGINALS + EDITS.index(edit), EDITS.index(edit)) for edit in ("copy", "jpeg", "brightness")}
    assert sure <= pair_set(found) <= sure | {(ORIGINALS + EDITS.index("shift"), EDITS.index("shift"))}
    assert set(found.by) == {"hash"}
    assert set(found.part) == {"both"}
    assert found.similarity.isnan().all()
    assert found.hash_distance[found.query == ORIGINALS].tolist() == [0]
    assert (found.correlation.diff() <= 0).all()
    assert (found.correlation >= MIN_CORRELATION).all()


@pytest.mark.parametrize("edit", EDITS)
def test_pixels_know_edits_and_no_strangers(edit: str) -> None:
    images = pictures(60)
    both = torch.cat([images, torch.stack([edited(image, edit) for image in images])])
    rows = torch.arange(60)
    assert (pixel_correlations(both, rows, rows + 60) >= MIN_CORRELATION).double().mean() >= 0.95
    assert (pixel_correlations(both, rows, rows.roll(1)) < MIN_CORRELATION).all()
    assert pixel_correlations(both, rows[:0], rows[:0]).tolist() == []
    shapes = ragged(list(both))
    assert torch.equal(pixel_correlations(shapes, rows, rows + 60), pixel_correlations(both, rows, rows + 60))


def test_descriptor_proposes_shift_and_mirror_and_both_criteria_merge(
    planted: tuple[Tensor, RetrievalTask, Tensor],
) -> None:
    images, query_task, train = planted
    descriptors = colour_histograms(images)
    found = audited(images, descriptors, query_task, train, neighbours=1, max_distance=6)
    by = {EDITS[query - ORIGINALS]: kind for query, kind in zip(found.query.tolist(), found.by, strict=True)}
    assert by.pop("shift") in ("both", "descriptor")
    assert by.pop("brightness") in ("both", "hash")  # colours change
    assert by == {"copy": "both", "jpeg": "both", "mirror": "descriptor"}
    assert pair_set(found) == {(ORIGINALS + i, i) for i in range(5)}
    cosine = (descriptors[found.query].double() * descriptors[found.other].double()).sum(1)
    assert torch.allclose(found.similarity.double(), cosine, atol=1e-6)
    assert found.hash_distance[found.query == ORIGINALS + 4].item() > 6


@pytest.mark.parametrize("narrow", [0.0, 0.05, 1.0])
def test_the_scale_of_a_model_s_cosines_makes_no_leaks(planted, narrow: float) -> None:
    """A network at the wrong resolution puts all images into a narrow cone, where every cosine is near 1."""
    images, query_task, train = planted
    cone = torch.ones(1, 216) / 216**0.5
    descriptors = F.normalize(cone + narrow * colour_histograms(images), dim=1)
    found = audited(images, descriptors, query_task, train)
    sure = {(ORIGINALS + i, i) for i in range(5)}
    assert pair_set(found) <= sure
    if narrow:
        assert pair_set(found) == sure
        # What decides does not come from the model.
        other = audited(images, F.normalize(images.float().flatten(1)), query_task, train)
        decided = dict(
            zip(zip(other.query.tolist(), other.other.tolist(), strict=True), other.correlation, strict=True)
        )
        for pair, value in zip(
            zip(found.query.tolist(), found.other.tolist(), strict=True), found.correlation, strict=True
        ):
            assert decided.get(pair, value) == value


@pytest.mark.parametrize(("right", "false"), [(400, 0), (400, 40), (300, 300), (50, 500)])
@pytest.mark.parametrize("mislabelled", [0.0, 0.02])
def test_the_estimated_precision_is_that_of_simulated_pairs_or_a_little_less(right, false, mislabelled) -> None:
    """200 audits: right pairs of one label, false ones and those that failed of different labels in 45 of 100."""
    estimates = []
    for seed in range(200):
        rng = torch.Generator().manual_seed(seed)
        chance = torch.rand(right + false + 3000, generator=rng)
        differing = chance < torch.tensor([mislabelled, 0.45, 0.45]).repeat_interleave(
            torch.tensor([right, false, 3000])
        )
        correlation = torch.cat([torch.full((right + false,), 0.8), 0.7 * torch.rand(3000, generator=rng)])
        estimates.append(estimated_precision(correlation, differing, 0.7))
    mean, truth = float(np.mean(estimates)), right / (right + false)
    assert truth - mislabelled / 0.45 - 0.02 <= mean <= truth + 0.02


def test_precision_that_labels_cannot_tell_is_nan() -> None:
    passed = torch.tensor([0.9, 0.8])
    assert math.isnan(estimated_precision(torch.empty(0), torch.empty(0, dtype=torch.bool), 0.7))
    assert math.isnan(estimated_precision(passed, torch.tensor([False, False]), 0.7))  # nothing failed
    one_label = torch.tensor([0.9, 0.1]), torch.tensor([False, False])
    assert math.isnan(estimated_precision(*one_label, 0.7))
    assert estimated_precision(torch.tensor([0.9, 0.1]), torch.tensor([False, True]), 0.7) == 1.0
    assert estimated_precision(torch.tensor([0.9, 0.1]), torch.tensor([True, True]), 0.7) == 0.0


def test_self_pairs_are_left_out_where_the_queries_search_themselves() -> None:
    images = pictures(6)
    images[4] = images[1]
    rows = torch.arange(6)
    found = audited(images, colour_histograms(images), task(rows, rows), rows[:2], max_distance=0)
    assert pair_set(found) == {(1, 4), (4, 1)}
    assert dict(zip(found.query.tolist(), found.part, strict=True)) == {1: "gallery", 4: "both"}
    assert found.queries("gallery").tolist() == [1, 4]
    assert found.queries("train").tolist() == [4]


def test_dropping_the_found_queries_leaves_a_task_without_duplicates(
    planted: tuple[Tensor, RetrievalTask, Tensor],
) -> None:
    images, query_task, train = planted
    found = audited(images, None, query_task, train)
    cleaned = drop_rows(query_task, found.queries("gallery"), "/without-duplicates")
    assert len(cleaned.query) == len(query_task.query) - len(found.query.unique()) < len(query_task.query)
    assert len(audited(images, None, cleaned, train)) == 0


def test_no_duplicates_is_a_result_too(tmp_path: Path) -> None:
    images = pictures(8)
    rows = torch.arange(8)
    found = audited(images, colour_histograms(images), task(rows[:4], rows[4:]), rows[:0])
    assert len(found) == 0
    assert found.queries("gallery").tolist() == []
    write_duplicates(tmp_path / "none.csv", found, labelled(images))
    assert (tmp_path / "none.csv").read_text() == ",".join(COLUMNS) + "\n"
    assert_equal(read_duplicates(tmp_path / "none.csv"), found)
    contact_sheet(images, found, tmp_path / "none.png")
    with Image.open(tmp_path / "none.png") as sheet:
        assert len(set(sheet.convert("L").tobytes())) > 1  # it says so


def labelled(images: Tensor) -> Collection:
    """The images with two attributes, the second unknown for row 0."""
    labels = torch.stack([torch.arange(len(images)) % 2, torch.zeros(len(images), dtype=torch.int64)], 1)
    labels[0, 1] = -1
    return Collection(
        "art", images, labels, ("style", "artist"), (("baroque", "art, nouveau"), ("Éva",)), labels[:, 0] == 1
    )


def assert_equal(first: Duplicates, second: Duplicates) -> None:
    for name in ("query", "other", "hash_distance"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert torch.equal(first.correlation, second.correlation)
    assert torch.equal(first.similarity.nan_to_num(-2), second.similarity.nan_to_num(-2))
    assert (first.part, first.by) == (second.part, second.by)


SOME = Duplicates(
    torch.tensor([3, 0, 1]),
    torch.tensor([1, 2, 2]),
    torch.tensor([0.9, 0.8, 0.7]),
    torch.tensor([0.1 + 0.2, 1 / 3, torch.nan]),
    torch.tensor([0, 12, 6]),
    ("both", "train", "gallery"),
    ("both", "descriptor", "hash"),
)


def test_csv_keeps_every_bit_and_names_the_labels(tmp_path: Path) -> None:
    path = tmp_path / "new" / "duplicates.csv"
    write_duplicates(path, SOME, labelled(pictures(4)))
    assert_equal(read_duplicates(path), SOME)
    assert path.read_text(encoding="utf-8").splitlines() == [
        "query,other,part,correlation,similarity,hash_distance,by,query_label,other_label",
        '3,1,both,0.9,0.3,0,both,"art, nouveau/Éva","art, nouveau/Éva"',
        "0,2,train,0.8,0.33333334,12,descriptor,baroque/?,baroque/Éva",
        '1,2,gallery,0.7,,6,hash,"art, nouveau/Éva",baroque/Éva',
    ]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "duplicates.csv"
    path.write_text("old")
    with pytest.raises(IndexError):
        write_duplicates(path, SOME, labelled(pictures(2)))  # rows 2 and 3 are not in it
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"duplicates\.csv does not have the columns query, other"),
        ("query,other\n1,2\n", r"does not have the columns part"),
        (",".join(COLUMNS) + "\n1,x,both,0.9,0.9,2,both,a,b\n", r"duplicates\.csv line 2 cannot be read .*'x'"),
        (",".join(COLUMNS) + "\n1,2,both,0.9,0.9,2,both,a,b\n3\n", r"line 3 cannot be read"),
        (",".join(COLUMNS) + "\n1,2,test,0.9,0.9,2,both,a,b\n", r"part must be 1 of gallery, train, both.*test"),
        (",".join(COLUMNS) + "\n1,1,both,0.9,0.9,2,both,a,b\n", r"row 1 is paired with itself"),
    ],
)
def test_a_damaged_csv_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "duplicates.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_duplicates(path)


def test_contact_sheet_shows_the_pairs_from_worst_to_least(tmp_path: Path) -> None:
    images = torch.arange(0, 250, 10, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 24, 32).contiguous()
    count = 24
    pairs = Duplicates(
        torch.zeros(count, dtype=torch.int64),
        torch.arange(1, count + 1),
        torch.linspace(1, 0.9, count),
        torch.full((count,), torch.nan),
        torch.full((count,), 9),
        ("gallery",) * count,
        ("descriptor",) * count,
    )
    contact_sheet(images, pairs, tmp_path / "all.png")
    contact_sheet(images, pairs, tmp_path / "three.png", limit=3)
    assert shown(tmp_path / "all.png") == {0, *range(10, 250, 10)}
    assert shown(tmp_path / "three.png") == {0, 10, 130, 240}  # the first, the middle, the last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.png", "three.png"]


def shown(path: Path) -> set[int]:
    """Grey values that fill at least a picture's worth of a sheet."""
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        values, counts = np.unique(np.asarray(sheet)[:, :, 0], return_counts=True)
    return set(values[counts > 96 * 72 * 0.9].tolist()) - {255}


def test_select_takes_masks_and_positions() -> None:
    assert SOME.select(SOME.hash_distance < 12).query.tolist() == [3, 1]
    assert SOME.select(torch.tensor([2, 0])).by == ("hash", "both")
    assert len(SOME.select(torch.zeros(3, dtype=torch.bool))) == 0


def test_wrong_input_is_named() -> None:
    images, rows = pictures(4), torch.arange(4)
    unit = F.normalize(torch.ones(4, 3), dim=1)
    hashes = torch.zeros(4, 8, dtype=torch.uint8)
    searched = task(rows[:2], rows[2:])
    with pytest.raises(ValueError, match=r"images must be uint8 \(N, 3, H, W\), got torch.float32"):
        perceptual_hashes(images.float())
    with pytest.raises(ValueError, match=r"other must be packed hashes uint8 \(N, 8\).*\(4, 4\)"):
        hash_pairs_between(hashes, hashes[:, :4], 6)
    with pytest.raises(ValueError, match=r"max_distance=65"):
        hash_pairs_between(hashes, hashes, 65)
    with pytest.raises(ValueError, match=r"descriptors float32 \(N, D\), got torch.float64"):
        audited(images, unit.double(), searched, rows)
    with pytest.raises(ValueError, match=r"descriptor 0 has length nan"):
        audited(images, unit * torch.nan, searched, rows)
    with pytest.raises(ValueError, match=r"min_correlation=nan is not a correlation"):
        audited(images, unit, searched, rows, min_correlation=math.nan)
    with pytest.raises(ValueError, match=r"neighbours=0 would propose no pairs"):
        audited(images, unit, searched, rows, neighbours=0)
    with pytest.raises(ValueError, match=r"4 images but 3 descriptors"):
        audited(images, unit[:3], searched, rows)
    with pytest.raises(ValueError, match=r"the collection's descriptor 0 has length 2"):
        audited(images, unit * 2, searched, rows)
    with pytest.raises(ValueError, match=r"row 4 lies outside the collection of 4 images"):
        audited(images, unit, searched, torch.tensor([4]))
    with pytest.raises(ValueError, match=r"part='test' is unknown"):
        SOME.queries("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"limit=0 would show nothing"):
        contact_sheet(images, NONE, Path("unused.png"), limit=0)
    with pytest.raises(ValueError, match=r"similarity must be torch.float32 \(3,\), got torch.float64"):
        replace(SOME, similarity=SOME.similarity.double())


def test_a_threshold_that_pairs_everything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_PAIRS", 10)
    hashes = torch.zeros(4, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="more than 10 pairs are within this distance: lower max_distance"):
        hash_pairs_between(hashes, hashes, 0)
