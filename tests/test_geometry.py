"""Geometric verification, against homographies that are known and loops that are naive."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simsearch.data.rendered.paint import paint_work, photograph
from simsearch.functional.geometry import mutual_pairs, plausible_view, verify
from simsearch.functional.sift import Sift, compact
from simsearch.types import LocalFeatures


def square(homography: np.ndarray, size: int) -> np.ndarray:
    """Where a homography puts the corners of a square, one by one."""
    found = []
    for x, y in ((0, 0), (size, 0), (size, size), (0, size)):
        u, v, w = homography @ [x, y, 1]
        found.append((u / w, v / w))
    return np.array(found)


def naive_pairs(query: np.ndarray, item: np.ndarray, ratio: float) -> set[tuple[int, int]]:
    gaps = [[float(((a - b) ** 2).sum()) for b in item.astype(float)] for a in query.astype(float)]
    found = set()
    for i, row in enumerate(gaps):
        j = int(np.argmin(row))
        second = sorted(row)[1]
        back = int(np.argmin([other[j] for other in gaps]))
        if back == i and row[j] <= ratio**2 * second:
            found.add((i, j))
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_pairs_are_those_of_a_naive_loop(seed, n, counts):
    rng = np.random.default_rng(seed)
    query = rng.integers(-127, 128, (n, 8), dtype=np.int8)
    items = [
        np.concatenate([query[: m // 2] // 2, rng.integers(-127, 128, (m - m // 2, 8), dtype=np.int8)])[:m]
        if m // 2 <= n
        else rng.integers(-127, 128, (m, 8), dtype=np.int8)
        for m in counts
    ]
    items = [item.astype(np.int8) for item in items]
    for item, (ours, theirs) in zip(items, mutual_pairs(query, items, 0.9), strict=True):
        expected = naive_pairs(query, item, 0.9) if len(item) > 1 else set()
        assert set(zip(ours.tolist(), theirs.tolist(), strict=True)) == expected


def test_a_feature_that_equals_two_is_paired_with_none():
    query = np.array([[5, 5], [90, -90]], np.int8)
    twice = np.array([[5, 5], [5, 5], [80, -90]], np.int8)  # both distances are 0, and 0 / 0 tells nothing
    once = np.array([[5, 5], [80, -90]], np.int8)
    found = mutual_pairs(query, [twice, once], 0.85)
    assert [list(zip(*(places.tolist() for places in pair), strict=True)) for pair in found] == [
        [(1, 2)],
        [(0, 0), (1, 1)],
    ]
    ((ours, theirs),) = mutual_pairs(query, [twice], 1.0)  # without the ratio test, the nearest is enough
    assert (ours.tolist(), theirs.tolist()) == ([0, 1], [0, 2])


def features(places: np.ndarray, descriptors: np.ndarray, size: int = 200) -> LocalFeatures:
    return LocalFeatures(places.astype(np.float32), descriptors, (size, size))


def moved(places: np.ndarray, homography: np.ndarray) -> np.ndarray:
    with_one = np.hstack([places, np.ones((len(places), 1))]) @ homography.T
    return with_one[:, :2] / with_one[:, 2:]


@pytest.mark.parametrize("angle", [0, 90, 180, 33])
def test_a_known_homography_is_found_among_wrong_pairs(angle):
    rng = np.random.default_rng(angle)
    turn = np.deg2rad(angle)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    centre = np.array([[1, 0, -100], [0, 1, -100], [0, 0, 1]])
    homography = np.array([[0.6, 0.05, 100], [0, 0.5, 100], [4e-4, 2e-4, 1]]) @ rotation @ centre
    places = rng.uniform(0, 200, (40, 2))
    descriptors = rng.integers(-127, 128, (40, 32), dtype=np.int8)
    to = moved(places, homography)
    to[25:] = rng.uniform(0, 200, (15, 2))  # of 40 pairs, 15 lead anywhere
    (match,) = verify(features(to, descriptors), [features(places, descriptors)])
    assert 25 <= match.inliers <= 28
    assert np.allclose(match.outline * 200, square(homography, 200), atol=1.0)
    assert np.allclose(match.points[:, 2:].max(axis=0), places[:25].max(axis=0) / 200, atol=0.15)
    assert match.residual < 1e-3


def test_random_features_do_not_agree():
    rng = np.random.default_rng(0)
    ours = rng.integers(-127, 128, (300, 32), dtype=np.int8)
    query = features(rng.uniform(0, 200, (300, 2)), ours)
    items = [
        features(rng.uniform(0, 200, (300, 2)), np.roll(ours, shift, axis=0)) for shift in range(50)
    ]  # 300 pairs that pass the ratio test, at random places
    assert max((m.inliers for m in verify(query, items) if m), default=0) < 10


def test_places_that_repeat_count_once():
    rng = np.random.default_rng(1)
    places = np.repeat(rng.uniform(0, 200, (6, 2)), 5, axis=0)
    descriptors = rng.integers(-127, 128, (30, 32), dtype=np.int8)
    (match,) = verify(features(places, descriptors), [features(places, descriptors)])
    assert match.inliers == 6


CORNERS = np.array([[0.0, 0], [100, 0], [100, 100], [0, 100]])


@pytest.mark.parametrize(
    "homography",
    [
        np.diag([-1.0, 1, 1]),  # mirrored
        np.diag([0.01, 0.01, 1]),  # tiny
        np.diag([30.0, 30, 1]),  # as if seen through a microscope
        np.diag([1.0, 0.05, 1]),  # flat
        np.array([[1, 0, 0], [0, 1, 0], [-0.02, 0, 1]]),  # partly behind the camera
        np.array([[1, 0, 0], [0, 1, 0], [0.06, 0, 1]]),  # one side seven times the other
    ],
)
def test_views_that_no_camera_has_are_refused(homography):
    assert plausible_view(homography, CORNERS, (100, 100)) is None


@pytest.mark.parametrize("degrees", [0, 30, 50])
def test_views_of_a_camera_are_plausible(degrees):
    """A square picture at a distance of two and a half of its sides, turned by this angle."""
    turn = np.deg2rad(degrees)
    x, y = (CORNERS - 50).T
    depth = 250 - x * np.sin(turn)
    view = np.stack([x * np.cos(turn), y]) / depth * 250 + 60
    a, b = [], []
    for (u, v), (p, q) in zip(CORNERS, view.T, strict=True):
        a += [[u, v, 1, 0, 0, 0, -p * u, -p * v], [0, 0, 0, u, v, 1, -q * u, -q * v]]
        b += [p, q]
    homography = np.append(np.linalg.solve(np.array(a), np.array(b)), 1).reshape(3, 3)
    assert np.allclose(plausible_view(homography, CORNERS, (120, 120)), view.T)


@pytest.fixture(scope="module")
def works() -> torch.Tensor:
    """12 works of 4 artists, uint8 (12, 3, 256, 256), of styles with corners. SIFT finds none in soft washes."""
    places = [(style, 0, work) for style in (1, 2, 4, 6) for work in range(3)]
    return torch.from_numpy(np.stack([paint_work(0, *place, size=256) for place in places]))


def test_photographs_match_their_works_alone(works):
    sift = Sift()
    items = [sift.describe(work, side=256, most=300) for work in works]
    shots = photograph(works, keys=[(0, 0, n, 0) for n in range(len(works))], seed=0, size=224)
    found = [verify(sift.describe(shot, side=224, most=500), items) for shot in shots]
    inliers = np.array([[match.inliers if match else 0 for match in row] for row in found])
    others = inliers.copy()
    np.fill_diagonal(others, 0)
    assert others.max() < 10
    assert (np.diag(inliers) >= 10).all(), inliers.diagonal()


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotated_copies_match(works, turns):
    sift = Sift()
    item, turned = (sift.describe(image, side=256, most=300) for image in (works[0], works[0].rot90(turns, (1, 2))))
    (match,) = verify(turned, [item])
    assert match.inliers > 30
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    assert np.allclose(match.outline, np.roll(corners, turns, axis=0), atol=0.02)  # top left goes to the bottom left


def test_compact_descriptors_keep_distances(works):
    """Distances of the stored bytes follow those of RootSIFT, computed by the definition."""
    import cv2

    grey = cv2.cvtColor(works[0].permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY)
    _, full = cv2.SIFT.create(nfeatures=200).detectAndCompute(grey, None)
    root = np.sqrt(full / full.sum(axis=1, keepdims=True))
    stored = compact(full).astype(float) / 256
    exact = np.linalg.norm(root[:, None] - root[None], axis=2)
    kept = np.linalg.norm(stored[:, None] - stored[None], axis=2)
    assert (kept <= exact + 0.02).all()  # a projection does not lengthen, rounding hardly
    assert np.corrcoef(exact.ravel(), kept.ravel())[0, 1] > 0.95


def test_an_image_without_a_feature_matches_nothing(works):
    sift = Sift()
    flat = sift.describe(torch.full((3, 64, 64), 90, dtype=torch.uint8), side=64, most=10)
    assert len(flat) == 0
    item = sift.describe(works[0], side=256, most=100)
    assert verify(flat, [item, flat]) == [None, None]
    assert verify(item, [flat]) == [None]
    assert verify(item, []) == []


@pytest.mark.parametrize("given", [{"ratio": 0}, {"ratio": 1.1}, {"tolerance": 0}])
def test_wrong_settings_are_refused(given):
    with pytest.raises(ValueError, match="ratio must lie in"):
        verify(LocalFeatures(np.zeros((0, 2), np.float32), np.zeros((0, 32), np.int8), (1, 1)), [], **given)


def test_wrong_images_are_refused():
    with pytest.raises(ValueError, match="must be uint8"):
        Sift().describe(torch.zeros(3, 8, 8), side=8, most=5)
    with pytest.raises(ValueError, match="at least 1"):
        Sift().describe(torch.zeros(3, 8, 8, dtype=torch.uint8), side=0, most=5)
    with pytest.raises(ValueError, match="contrast"):
        Sift(contrast=-1)
