"""Correlation of pictures against NumPy's, one place at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simsearch.functional.correlation import (
    COARSE,
    FINE,
    _blurred,
    _perspective,
    aligned_correlation,
    best_correlations,
    details,
)


def grey(count: int, seed: int, side: int = 20) -> Tensor:
    coarse = torch.randn(count, 5, 5, generator=torch.Generator().manual_seed(seed))
    return 128 + 40 * coarse.repeat_interleave(side // 5, 1).repeat_interleave(side // 5, 2)


def test_the_best_is_that_of_all_places_and_of_the_mirror_image() -> None:
    first, second = details(grey(6, seed=0)), details(grey(6, seed=1))
    for shift in (0, 1, 3):
        got = best_correlations(first, second, shift)
        side = 20 - 2 * shift
        for a, b, value in zip(first.numpy(), second.numpy(), got.tolist(), strict=True):
            template = a[shift : shift + side, shift : shift + side].ravel()
            windows = [
                image[y : y + side, x : x + side].ravel()
                for image in (b, b[:, ::-1])
                for y in range(2 * shift + 1)
                for x in range(2 * shift + 1)
            ]
            assert value == pytest.approx(max(np.corrcoef(template, w)[0, 1] for w in windows), abs=1e-4)


def test_light_shift_and_mirror_leave_a_picture_the_same() -> None:
    picture, other = grey(8, seed=2), grey(8, seed=3)
    rolled = picture.roll((1, -2), (1, 2))
    for edited in (picture, 0.7 * picture + 20, rolled, picture.flip(2), rolled.flip(2)):
        assert (best_correlations(details(picture), details(edited), 2) > 0.9).all()
    assert (best_correlations(details(picture), details(other), 2) < 0.7).all()


def test_a_frame_weighs_less_than_what_it_frames() -> None:
    """Undivided details of framed strangers correlate at .8 to .9: a frame has the strongest edges of all."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    inside = (y - 15.5).square() + (x - 15.5).square() < 14**2
    cells = [torch.randn(9, 1, 11, 11, generator=generator) for generator in generators(2)]
    content = [F.interpolate(part, size=(32, 32), mode="bilinear")[:, 0] for part in cells]
    first, second = (torch.where(inside, 100 + 30 * part, 255.0) for part in content)
    undivided = best_correlations(*(_blurred(part, FINE) - _blurred(part, COARSE) for part in (first, second)), 2)
    assert (undivided > 0.75).all()
    assert best_correlations(details(first), details(second), 2).mean() < undivided.mean() - 0.1
    assert (best_correlations(details(first), details(0.8 * first + 30), 2) > 0.9).all()


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_plain_pictures_are_like_nothing() -> None:
    picture = grey(2, seed=0)
    plain = torch.full_like(picture, 90.0)
    noisy = plain + 0.3 * torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    for one in (plain, noisy):
        assert best_correlations(details(one), details(picture), 2).tolist() == [0.0, 0.0]
        assert best_correlations(details(one), details(one), 2).tolist() == [0.0, 0.0]
    assert best_correlations(torch.empty(0, 8, 8), torch.empty(0, 8, 8), 2).tolist() == []


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"two \(P, H, W\), got \(2, 8, 8\) and \(3, 8, 8\)"):
        best_correlations(torch.zeros(2, 8, 8), torch.zeros(3, 8, 8), 1)
    for shift in (-1, 4):
        with pytest.raises(ValueError, match=rf"shift={shift} leaves nothing"):
            best_correlations(torch.zeros(2, 8, 8), torch.zeros(2, 8, 8), shift)


def test_a_perspective_puts_pixels_where_the_homography_through_its_corners_does() -> None:
    corners = np.array([[0.1, 0.2], [0.9, 0.15], [0.8, 0.95], [0.2, 0.7]])
    unit = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    rows = []
    for (x, y), (u, v) in zip(unit, corners, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    homography = np.append(np.linalg.solve(rows, corners.ravel()), 1).reshape(3, 3)
    got = _perspective(torch.from_numpy(corners), 4).numpy()
    for y in range(4):
        for x in range(4):
            u, v, w = homography @ [(x + 0.5) / 4, (y + 0.5) / 4, 1]
            np.testing.assert_allclose(got[y, x], [u / w, v / w])


def test_a_part_of_a_picture_is_alike_where_its_outline_says_and_nowhere_else() -> None:
    noise = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    picture = (255 * F.interpolate(noise, (240, 240), mode="bicubic")[0]).clamp(0, 255).to(torch.uint8)
    part = picture[:, 60:160, 80:200]  # y 60 to 160, x 80 to 200
    left, right, top, bottom = 80 / 240, 200 / 240, 60 / 240, 160 / 240
    outline = torch.tensor([[left, top], [right, top], [right, bottom], [left, bottom]])
    assert aligned_correlation(picture, part, outline) > 0.95
    assert aligned_correlation(picture, part.rot90(1, (1, 2)), outline.roll(-1, 0)) > 0.95
    assert aligned_correlation(picture, part.flip(2), outline[[1, 0, 3, 2]]) > 0.95
    assert aligned_correlation(picture, part, outline + 0.05) < 0.5
    beyond = torch.tensor([[-1.0, 0], [1, 0], [1, 1], [-1, 1]])  # half of what it shows lies outside
    assert aligned_correlation(picture, torch.cat([255 - picture, picture], 2), beyond) > 0.9
    assert aligned_correlation(picture, torch.full_like(part, 90), outline) == 0
    assert aligned_correlation(picture, part, outline + 5) == 0  # outside of the picture
