"""Augmented copies, what a camera does to them, and their loss and sampler."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pytorch_metric_learning.losses import NTXentLoss

from simsearch.data.copies import RandomCopies
from simsearch.data.rendered.paint import paint_work
from simsearch.data.samplers import ShuffledBatches, ViewBatches
from simsearch.functional.camera import blur, jpeg, perspective_grid
from simsearch.functional.ragged import ragged
from simsearch.losses.spread import SpreadLoss


def works(count: int, size: int = 96) -> torch.Tensor:
    return torch.from_numpy(np.stack([paint_work(0, n % 8, n // 8, 0, size=size) for n in range(count)]))


def test_the_grid_maps_corners_edges_and_diagonals_of_the_quadrilateral():
    corners = torch.tensor([[[-0.9, -0.8], [0.7, -1.0], [1.0, 0.9], [-0.6, 0.5]]], dtype=torch.float64)
    size = 101
    grid = perspective_grid(corners, size)[0].double()
    middle = grid[50, 50]
    upper_left, upper_right, lower_right, lower_left = corners[0]

    def side(a: torch.Tensor, b: torch.Tensor, p: torch.Tensor) -> float:
        return float((b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]))

    # a projective map keeps lines: the middle lies on both diagonals, and rows stay straight
    assert side(upper_left, lower_right, middle) == pytest.approx(0, abs=1e-5)
    assert side(upper_right, lower_left, middle) == pytest.approx(0, abs=1e-5)
    for row in (0, 20, 100):
        assert side(grid[row, 0], grid[row, 100], grid[row, 37]) == pytest.approx(0, abs=1e-5)
    for corner, (y, x) in zip(corners[0], ((0, 0), (0, 100), (100, 100), (100, 0)), strict=True):
        assert (grid[y, x] - corner).abs().max() < 0.02  # half a pixel inside


def test_the_whole_picture_is_the_identity():
    corners = torch.tensor([[[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]])
    picture = works(1).float()
    same = F.grid_sample(picture, perspective_grid(corners, 96), align_corners=False)
    torch.testing.assert_close(same, picture, atol=0.1, rtol=0)


def test_blur_equals_a_convolution():
    picture = works(2).float() / 255
    kernel = torch.tensor([[0.25, 0.5, 0.25], [0.0, 1.0, 0.0]])
    mine = blur(picture, kernel[:, :, None, None])
    padded = F.pad(picture[:1], [1, 1, 1, 1], mode="replicate")
    weight = (kernel[0][:, None] * kernel[0][None]).expand(3, 1, 3, 3)
    torch.testing.assert_close(mine[:1], F.conv2d(padded, weight, groups=3))
    torch.testing.assert_close(mine[1:], picture[1:])


@pytest.mark.parametrize("quality", [10, 30, 60, 90])
def test_jpeg_loses_what_libjpeg_loses(quality):
    picture = works(6, size=93)
    mine = (255 * jpeg(picture.float() / 255, torch.full((6,), quality))).round()
    alike, amount = [], []
    for image, got in zip(picture, mine, strict=True):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling=0)
        theirs = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float()
        lost = torch.stack([(theirs - image).flatten(), (got - image).flatten()])
        alike.append(float(torch.corrcoef(lost)[0, 1]))
        amount.append(float(lost[1].abs().mean() / lost[0].abs().mean()))
    # libjpeg also rounds colours to integers between its steps, which counts where the quality is high
    assert np.mean(alike) > 0.9
    assert np.allclose(amount, 0.95, atol=0.1)


def test_without_strength_a_copy_is_its_picture():
    picture = works(4)
    copies = RandomCopies(strength=0.0, mirror=0.0)(picture)
    assert (copies.float() - picture.float()).abs().mean() < 2.5  # frames alone are left, outside of the picture
    mirrored = RandomCopies(strength=0.0, mirror=1.0)(picture)
    assert (mirrored.float() - picture.flip(3).float()).abs().mean() < 2.5


@given(strength=st.floats(0, 1), count=st.integers(1, 20), seed=st.integers(0, 99), size=st.sampled_from([16, 33, 64]))
@settings(max_examples=15, deadline=None)
def test_copies_have_the_size_and_dtype_asked_for_and_follow_the_seed(strength, count, seed, size):
    picture = works(count, size=48)
    torch.manual_seed(seed)
    copies = RandomCopies(strength, size=size)(picture)
    assert copies.shape == (count, 3, size, size)
    assert copies.dtype == torch.uint8
    torch.manual_seed(seed)
    assert torch.equal(copies, RandomCopies(strength, size=size)(picture))


def test_views_of_one_picture_differ_and_still_show_it():
    torch.manual_seed(0)
    picture = works(16).repeat_interleave(2, 0)
    copies = RandomCopies(strength=0.5)(picture).float()
    first, second = copies[::2].flatten(1), copies[1::2].flatten(1)
    assert ((first - second).abs().mean(1) > 3).all()
    small = F.interpolate(copies, 12, mode="bilinear", antialias=True).flatten(1)
    small = F.normalize(small - small.mean(1, keepdim=True), dim=1)
    similar = small @ small.T
    own = similar[::2, 1::2].diagonal().mean()
    other = similar[::2, 1::2][~torch.eye(16, dtype=torch.bool)].mean()
    assert own > other + 0.2


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="strength must lie"):
        RandomCopies(strength=1.5)
    with pytest.raises(ValueError, match="mirror must lie"):
        RandomCopies(mirror=-0.1)
    with pytest.raises(ValueError, match="at least 8"):
        RandomCopies(size=4)
    with pytest.raises(ValueError, match="squares"):
        RandomCopies()(torch.zeros(2, 3, 8, 9, dtype=torch.uint8))
    with pytest.raises(ValueError, match="squares"):
        RandomCopies()(ragged([torch.zeros(3, 8, 8, dtype=torch.uint8)]))  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "images", "views"), [(10, 4, 2), (12, 4, 3), (9, 4, 2)])
def test_view_batches_hold_each_row_of_shuffled_batches_several_times(count, images, views):
    labels = torch.arange(count)
    mine, plain = ViewBatches(labels, images, views, seed=3), ShuffledBatches(labels, images, seed=3)
    for got, once in zip(list(mine), list(plain), strict=True):
        assert got == [row for row in once for _ in range(views)]
    with pytest.raises(ValueError, match="images=1"):
        ViewBatches(labels, 1)
    with pytest.raises(ValueError, match="views=1"):
        ViewBatches(labels, 4, views=1)


def test_ranks_get_whole_rows_of_full_batches():
    sampler = ViewBatches(torch.arange(16), 4, 2, seed=0)
    sampler.whole = True
    for batches in zip(*(sampler.batches(rank, 2) for rank in range(2)), strict=True):
        for batch in batches:
            assert batch[::2] == batch[1::2]
            assert len(batch) == 8
        assert not set(batches[0]) & set(batches[1])


def naive(x: torch.Tensor, labels: torch.Tensor, temperature: float, weight: float) -> torch.Tensor:
    unit = [row / row.norm() for row in x]
    pairs, spread = [], []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if labels[j] != labels[i]]
        negative = sum(torch.exp(unit[i] @ unit[j] / temperature) for j in others)
        for p in range(len(x)):
            if p != i and labels[p] == labels[i]:
                positive = torch.exp(unit[i] @ unit[p] / temperature)
                pairs.append(-torch.log(positive / (positive + negative)))
        spread.append(torch.log(min((unit[i] - unit[j]).norm() for j in others)))
    return sum(pairs) / len(pairs) - weight * sum(spread) / len(spread)


def test_the_loss_against_loops_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    loss = SpreadLoss(NTXentLoss(temperature=0.3), weight=0.7)
    value, wanted = loss(x, labels), naive(x, labels, 0.3, 0.7)
    torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-6)
    got, want = torch.autograd.grad(value, x)[0], torch.autograd.grad(wanted, x)[0]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_one_class_has_no_spread_and_equal_vectors_are_finite():
    loss = SpreadLoss(lambda embeddings, labels: embeddings.sum() * 0, weight=1.0)  # type: ignore[arg-type]
    assert float(loss(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))) == 0
    x = torch.ones(2, 2, requires_grad=True)
    value = loss(x, torch.tensor([0, 1]))
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"loss\.weight=-1"):
        SpreadLoss(NTXentLoss(), weight=-1)
