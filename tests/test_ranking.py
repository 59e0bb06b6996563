"""Full rankings against scikit-learn, torchmetrics and naive loops; junk, blocks, threads and memory."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.retrieval as peer
from conftest import in_ranks
from sklearn.metrics import average_precision_score, ndcg_score

from simsearch.functional.codes import pack_codes, unpack_codes
from simsearch.functional.ranking import (
    average_precision_in_index_order,
    best_of_all,
    find_junk,
    measure_ranking,
    rank,
    rank_codes,
)
from simsearch.types import Descriptors

KS = (1, 3, 10, 40)
WIDTHS = [1, 7, 8, 12, 48, 64, 65, 128, 255, 256, 300]


def real(n: int, *, seed: int, first: int = 0, classes: int = 4, d: int = 6) -> Descriptors:
    """Random unit vectors with labels -1..classes-1 and groups -1..n/4."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(n, d, generator=generator))
    label = torch.randint(-1, classes, (n,), generator=generator)
    group = torch.randint(-1, max(n // 4, 1), (n,), generator=generator)
    return Descriptors(vectors, label, torch.arange(first, first + n), group=group)


def codes(n: int, bits: int, *, seed: int, first: int = 0, classes: int = 3) -> Descriptors:
    """Random codes whose labels pull them together."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(-1, classes, (n,), generator=generator)
    centres = torch.randn(classes + 1, bits, generator=torch.Generator().manual_seed(99))
    outputs = centres[label] + torch.randn(n, bits, generator=generator)
    group = torch.randint(-1, max(n // 4, 1), (n,), generator=generator)
    return Descriptors(pack_codes(outputs), label, torch.arange(first, first + n), bits, group)


def kept(query: Descriptors, gallery: Descriptors, i: int, exclude_self: bool) -> list[int]:
    """Gallery positions that query i ranks, by naive loop."""
    positions = []
    for j in range(len(gallery)):
        itself = exclude_self and int(query.index[i]) == int(gallery.index[j])
        same = (
            query.group is not None and gallery.group is not None and int(query.group[i]) == int(gallery.group[j]) >= 0
        )
        if not itself and not same:
            positions.append(j)
    return positions


def without_group(d: Descriptors) -> Descriptors:
    return Descriptors(d.vectors, d.label, d.index, d.bits)


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name].nan_to_num(-1), right[name].nan_to_num(-1)), name


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("groups", [False, True])
def test_without_ties_equals_scikit_learn_and_torchmetrics(exclude_self, groups):
    query, gallery = real(30, seed=1, first=10), real(60, seed=2)
    if not groups:
        query, gallery = without_group(query), without_group(gallery)
    measured = measure_ranking(query, gallery, ks=KS, exclude_self=exclude_self)
    scores = (query.vectors.double() @ gallery.vectors.double().T).numpy()
    valued = 0
    for i in range(len(query)):
        columns = kept(query, gallery, i, exclude_self)
        right = (gallery.label[columns] == query.label[i]).numpy() & (int(query.label[i]) >= 0)
        row = scores[i, columns]
        assert len(set(row)) == len(row)
        if not right.any():
            assert all(value[i].isnan() for name, value in measured.items() if name != "relevant")
            continue
        valued += 1
        values = {name: float(value[i]) for name, value in measured.items()}
        preds, target = torch.from_numpy(row - row.min() + 1.0), torch.from_numpy(right)
        assert values["relevant"] == right.sum()
        assert values["AP"] == pytest.approx(average_precision_score(right, row), abs=1e-12)
        assert values["RP"] == pytest.approx(float(peer.retrieval_r_precision(preds, target)), abs=1e-6)
        ordered = right[np.argsort(-row)]
        for k in KS:
            ranks = [r for r in range(1, min(k, len(ordered)) + 1) if ordered[r - 1]]
            within = sum(ordered[:r].sum() / r for r in ranks)
            assert values[f"AP@{k}_minRk"] == pytest.approx(within / min(k, right.sum()), abs=1e-12)
            assert values[f"AP@{k}_R"] == pytest.approx(within / right.sum(), abs=1e-12)
            assert values[f"NDCG@{k}"] == pytest.approx(ndcg_score([right], [row], k=k), abs=1e-12)
            assert values[f"P@{k}"] == pytest.approx(float(peer.retrieval_precision(preds, target, top_k=k)), abs=1e-6)
            assert values[f"R@{k}"] == float(peer.retrieval_hit_rate(preds, target, top_k=k))
    assert valued > 15


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_equal_a_naive_loop(bits):
    """The rankings themselves: every group's rank, size and hits, with self matches and groups out."""
    query, gallery = codes(13, bits, seed=3, first=30), codes(45, bits, seed=4)
    (ranking,) = rank_codes(query, gallery, exclude_self=True)
    found = {
        (int(q), int(a), int(n)): (int(p), int(r))
        for q, a, n, p, r in zip(ranking.query, ranking.at, ranking.size, ranking.hits_above, ranking.hits, strict=True)
    }
    expected = {}
    unpacked = [unpack_codes(d.vectors, bits).int().tolist() for d in (query, gallery)]
    for i in range(len(query)):
        items = [
            (
                sum(a != b for a, b in zip(unpacked[0][i], unpacked[1][j], strict=True)),
                int(query.label[i]) == int(gallery.label[j]) >= 0,
            )
            for j in kept(query, gallery, i, exclude_self=True)
        ]
        assert int(ranking.relevant[i]) == sum(right for _, right in items)
        for distance in {d for d, right in items if right}:
            key = (i, sum(d < distance for d, _ in items), sum(d == distance for d, _ in items))
            expected[key] = (
                sum(right for d, right in items if d < distance),
                sum(right for d, right in items if d == distance),
            )
    assert found == expected


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_equal_sign_vectors(bits):
    """A Hamming distance is (bits - inner product of the +-1 vectors) / 2."""
    query, gallery = codes(40, bits, seed=5), codes(70, bits, seed=6, first=25)

    def signs(d: Descriptors) -> Descriptors:
        return Descriptors(2 * unpack_codes(d.vectors, bits) - 1, d.label, d.index, group=d.group)

    measured = measure_ranking(query, gallery, ks=KS, exclude_self=True)
    expected = measure_ranking(signs(query), signs(gallery), ks=KS, exclude_self=True)
    for name, value in expected.items():
        torch.testing.assert_close(measured[name], value, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("bits", [5, 48, 128])
def test_index_order_equals_a_stable_sort(bits):
    query, gallery = codes(30, bits, seed=7, first=20), codes(50, bits, seed=8)
    measured = average_precision_in_index_order(query, gallery, exclude_self=True)
    unpacked = [unpack_codes(d.vectors, bits).int().tolist() for d in (query, gallery)]
    for i in range(len(query)):
        distance = {
            j: sum(a != b for a, b in zip(unpacked[0][i], unpacked[1][j], strict=True))
            for j in kept(query, gallery, i, exclude_self=True)
        }
        order = sorted(distance, key=distance.__getitem__)
        ranks = [r for r, j in enumerate(order, 1) if gallery.label[j] == query.label[i] >= 0]
        if ranks:
            value = sum(hits / r for hits, r in enumerate(ranks, 1)) / len(ranks)
            assert float(measured[i]) == pytest.approx(value, abs=1e-12)
        else:
            assert measured[i].isnan()


def test_find_junk_equals_a_naive_loop():
    query, gallery = real(25, seed=9, first=10), real(40, seed=10)
    for exclude_self in (False, True):
        junk = find_junk(query, gallery, exclude_self=exclude_self)
        naive = [
            (i, j)
            for i in range(len(query))
            for j in sorted(set(range(len(gallery))) - set(kept(query, gallery, i, exclude_self)))
        ]
        assert list(zip(junk.rows.tolist(), junk.columns.tolist(), strict=True)) == naive
        rows, columns = junk.block(5, 9)
        assert [(r + 5, c) for r, c in zip(rows.tolist(), columns.tolist(), strict=True)] == [
            (i, j) for i, j in naive if 5 <= i < 9
        ]
    assert len(find_junk(without_group(query), gallery, exclude_self=False).rows) == 0


@pytest.mark.parametrize("kind", ["real", "codes"])
def test_all_relevant_items_are_junk(kind):
    vectors = {"real": torch.tensor([[1.0], [0.5], [0.2]]), "codes": torch.tensor([[1], [3], [6]]).byte()}[kind]
    bits = 3 if kind == "codes" else None
    gallery = Descriptors(vectors, torch.tensor([7, 7, 3]), torch.tensor([0, 1, 2]), bits, torch.tensor([4, 4, 5]))
    query = Descriptors(vectors[:2], torch.tensor([7, 3]), torch.tensor([0, 9]), bits, torch.tensor([4, -1]))
    measured = measure_ranking(query, gallery, ks=(1, 5), exclude_self=True)
    assert measured["relevant"].tolist() == [0, 1]
    assert measured["AP"][0].isnan()
    assert float(measured["AP"][1]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", ["real", "codes"])
def test_one_query_against_one_item(kind):
    vectors = torch.tensor([[0.5]]) if kind == "real" else torch.tensor([[1]]).byte()
    bits = None if kind == "real" else 1
    one = Descriptors(vectors, torch.tensor([0]), torch.tensor([0]), bits)
    values = {name: float(value) for name, value in measure_ranking(one, one, ks=(1, 4)).items()}
    assert values.pop("P@4") == 0.25
    assert set(values.values()) == {1.0}
    assert measure_ranking(one, one, exclude_self=True)["AP"].isnan().all()


def test_k_beyond_the_gallery_counts_missing_ranks_as_wrong():
    query, gallery = without_group(real(9, seed=11, first=50)), without_group(real(20, seed=12))
    values = measure_ranking(query, gallery, ks=(20, 1000))
    torch.testing.assert_close(values["P@1000"] * 50, values["P@20"], equal_nan=True)
    valued = values["relevant"] > 0
    assert valued.any()
    torch.testing.assert_close(values["P@1000"][valued] * 1000, values["relevant"][valued])
    for name in ("R", "NDCG"):
        torch.testing.assert_close(values[f"{name}@1000"], values[f"{name}@20"], equal_nan=True)
    for name in ("AP@1000_minRk", "AP@1000_R"):
        torch.testing.assert_close(values[name], values["AP"], equal_nan=True)


@pytest.mark.parametrize("kind", ["real", "codes"])
def test_blocks_and_threads_change_nothing(kind):
    """Bit for bit, with gallery vectors that tie because they are equal."""
    if kind == "real":
        query, gallery = real(67, seed=13, first=100, d=64), real(150, seed=14, d=64)
        doubled = gallery.vectors.repeat(5, 1)[:743]
        gallery = Descriptors(doubled, gallery.label.repeat(5)[:743], torch.arange(743))
    else:
        query, gallery = codes(67, 48, seed=13, first=100), codes(743, 48, seed=14)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = measure_ranking(query, gallery, ks=KS, exclude_self=True)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for block_bytes in (1, 8 * 743 * 9, 8 * 743 * 33, 2**27):
                blocks = len(list(rank(query, gallery, block_bytes=block_bytes)))
                assert blocks >= len(query) / (4 * threads) if block_bytes == 1 else blocks < len(query)
                assert_equal(
                    measure_ranking(query, gallery, ks=KS, exclude_self=True, block_bytes=block_bytes),
                    expected,
                )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("queries", [1, 2, 3, 5])
@pytest.mark.parametrize("d", [8, 64, 512])
@pytest.mark.parametrize("threads", [1, 2])
def test_equal_vectors_tie_whatever_their_place(queries, d, threads):
    """Few rows by many columns is where matrix kernels treat the last columns differently."""
    one = torch.nn.functional.normalize(torch.randn(50, d, generator=torch.Generator().manual_seed(15)))
    label = torch.where(torch.arange(2047) < 1000, 1, 0)
    gallery = Descriptors(one.repeat(41, 1)[:2047], label, torch.arange(2047))
    vectors = torch.nn.functional.normalize(torch.randn(5, d, generator=torch.Generator().manual_seed(16)))
    query = Descriptors(vectors[:queries], torch.ones(queries, dtype=torch.int64), torch.arange(queries))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        (ranking,) = rank(query, gallery)
    finally:
        torch.set_num_threads(before)
    assert not ranking.alone.any()
    assert torch.bincount(ranking.query).tolist() == [50] * queries  # one group a distinct vector


def test_errors_name_the_thing():
    vectors, short, long = real(3, seed=1), codes(3, 8, seed=1), codes(3, 12, seed=1)
    with pytest.raises(ValueError, match="gallery is empty"):
        measure_ranking(vectors, Descriptors(torch.zeros(0, 6), torch.zeros(0).long(), torch.zeros(0).long()))
    with pytest.raises(ValueError, match="no queries"):
        measure_ranking(Descriptors(torch.zeros(0, 6), torch.zeros(0).long(), torch.zeros(0).long()), vectors)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        measure_ranking(vectors, vectors, ks=(1, 0))
    with pytest.raises(ValueError, match="6 columns, bits None against 1 columns, bits 8"):
        measure_ranking(vectors, short)
    with pytest.raises(ValueError, match="5 columns"):
        measure_ranking(vectors, real(3, seed=1, d=5))
    for left, right in ((short, long), (vectors, vectors)):
        with pytest.raises(ValueError, match="codes of one width"):
            next(rank_codes(left, right))
        with pytest.raises(ValueError, match="codes of one width"):
            average_precision_in_index_order(left, right)


def _memory(field: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def _growth(_: int, path: str) -> None:
    """Writes the MiB by which a ranking's memory grows at most, by width in bits."""
    torch.set_num_threads(1)
    growth = {}
    for bits, q, g in ((None, 4000, 20000), (48, 4000, 40000), (248, 4000, 100)):
        parts = []
        for n, first in ((q, g), (g, 0)):
            vectors = torch.randn(n, 8) if bits is None else torch.randint(0, 256, (n, bits // 8)).byte()
            parts.append(Descriptors(vectors, torch.arange(n) % 10, torch.arange(first, first + n), bits))
        few = [Descriptors(part.vectors[:50], part.label[:50], part.index[:50], bits) for part in parts]
        measure_ranking(*few)  # what a first call loads and keeps is not a ranking's
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
        before = _memory("VmRSS")
        measure_ranking(*parts, block_bytes=2**22)
        growth[str(bits)] = _memory("VmHWM") - before
    Path(path).write_text(json.dumps(growth))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from /proc")
def test_memory_stays_a_block(tmp_path):
    """Scores would take 320 MB (float32) and 160 MB (bytes); joint histograms of short galleries 2 GB."""
    in_ranks(_growth, 1, str(tmp_path / "growth.json"))
    growth = json.loads((tmp_path / "growth.json").read_text())
    assert growth.keys() == {"None", "48", "248"}
    assert max(growth.values()) < 64, f"MiB by width in bits: {growth}"


def test_a_label_that_the_gallery_lacks_is_not_taken_for_its_neighbour():
    """Its place in label order is where the next label begins."""
    codes = torch.randint(0, 256, (40, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    gallery = Descriptors(codes[:30], torch.tensor([0, 2, 4]).repeat_interleave(10), torch.arange(30), bits=16)
    query = Descriptors(codes[30:], torch.tensor([2, 1, 2, 1, 3, 4, 3, 4, -1, 0]), torch.arange(30, 40), bits=16)
    together = measure_ranking(query, gallery, ks=(1,))["relevant"].tolist()
    assert together == [10, 0, 10, 0, 0, 10, 0, 10, 0, 10]


def test_what_ranks_stays_below_the_marks_of_junk_and_of_what_goes_ahead():
    """The longest descriptors that there may be, against float64; longer ones are refused, not lost as junk."""
    vectors = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))
    longest = 0.999 * 2.0**48 * torch.nn.functional.normalize(vectors)
    label = torch.arange(40) % 4
    got = measure_ranking(*(Descriptors(longest, label, torch.arange(40)),) * 2, ks=KS, exclude_self=True)
    scores = (longest.double() @ longest.double().T).fill_diagonal_(-torch.inf)
    for q in range(40):
        right = (label == label[q])[scores[q].argsort(descending=True)[:-1]].double()
        precision = right.cumsum(0) / torch.arange(1, 40)
        assert got["AP"][q].item() == pytest.approx(float((precision * right).sum() / right.sum()), abs=1e-12)
    with pytest.raises(ValueError, match=r"descriptors have a norm of 3e\+19 in row 1.*scale or normalise"):
        Descriptors(torch.tensor([[1.0], [3e19]]), torch.zeros(2).long(), torch.arange(2))


@pytest.mark.parametrize("k", [0, 1, 4, 12, 20])
def test_the_best_of_all_are_those_of_a_stable_sort(k):
    scores = torch.randint(0, 4, (50, 12), generator=torch.Generator().manual_seed(k)).float()
    scores[scores == 0] = -torch.inf
    ids, best = best_of_all(scores, k)
    for row, got, values in zip(scores.tolist(), ids.tolist(), best.tolist(), strict=True):
        order = sorted(range(12), key=lambda i: (-row[i], i))[:k]
        assert values == [row[i] for i in order]
        assert [i for i, v in zip(got, values, strict=True) if v > -torch.inf] == [
            i for i in order if row[i] > -torch.inf
        ]
