"""Statistics of layers and colour histograms against loops and hand-worked values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simsearch.functional.colour import colour_shares, hellinger_pyramid, lab, soft_bins
from simsearch.functional.style_statistics import gram, moments, signed_root_unit
from simsearch.models.backbones import lite0_backbone, timm_backbone
from simsearch.models.colour import ColourLayout, colour_backbone
from simsearch.models.style import LayerStatistics


def features(seed: int = 0, shape: tuple[int, ...] = (3, 5, 4, 7)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestStatistics:
    def test_moments_are_numpys(self):
        maps = features()
        flat = maps.double().numpy().reshape(3, 5, -1)
        expected = np.concatenate([flat.mean(2), np.sqrt(flat.var(2) + 1e-5)], axis=1)
        np.testing.assert_allclose(moments(maps).numpy(), expected, rtol=1e-5, atol=1e-6)
        assert moments(features(shape=(2, 5, 1, 1))).isfinite().all()

    def test_gram_by_loops(self):
        maps = features()
        found = gram(maps)
        assert found.shape == (3, 15)
        for b in range(3):
            place = 0
            for i in range(5):
                for j in range(i, 5):
                    expected = sum(
                        float(maps[b, i, y, x]) * float(maps[b, j, y, x]) for y in range(4) for x in range(7)
                    )
                    assert float(found[b, place]) == pytest.approx(expected / 28, abs=1e-5)
                    place += 1

    def test_signed_root_keeps_signs_and_has_norm_1_and_a_slope(self):
        vectors = torch.tensor([[4.0, -9.0, 0.0]], requires_grad=True)
        roots = signed_root_unit(vectors)
        torch.testing.assert_close(roots, torch.tensor([[2.0, -3.0, 0.0]]) / 13**0.5)
        roots.sum().backward()
        assert vectors.grad.isfinite().all()


class TestLayerStatistics:
    def test_blocks_are_those_of_the_stages(self):
        backbone = lite0_backbone("random", 64, "torch", statistics="moments", stages=[5, 0, 3]).eval()
        assert backbone.channels == 2 * (16 + 112 + 1280)
        assert backbone.name == "efficientnet-lite0/moments/0-3-5"
        image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        model, pixels = backbone.network.model, backbone.preprocess(image)
        x = model.bn1(model.conv_stem(pixels))
        maps = []
        for number, block in enumerate(model.blocks):
            x = block(x)
            maps += [x] if number in (0, 4) else []
        maps.append(model.bn2(model.conv_head(x)))
        blocks = [F.normalize(moments(m).sign() * moments(m).abs().sqrt(), dim=1) / 3**0.5 for m in maps]
        found = backbone(image)
        torch.testing.assert_close(found[:, :, 0, 0], torch.cat(blocks, dim=1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(2))

    @pytest.mark.parametrize("statistics", ["moments", "gram"])
    def test_onnx_gives_the_same_on_images_of_many_shapes(self, statistics):
        backbone = timm_backbone("test_efficientnet", "random", 64, statistics=statistics, stages=[0, 1], fit="longest")
        backbone.requires_grad_(False).eval()
        for shape in ((64, 40), (33, 64)):
            image = torch.randint(0, 256, (3, 3, *shape), dtype=torch.uint8)
            backbone.runtime = "torch"
            expected = backbone(image)
            backbone.runtime = "onnx"
            torch.testing.assert_close(backbone(image), expected, rtol=1e-3, atol=1e-4)

    def test_statistics_do_not_see_where(self):
        network = nn.Module()
        network.feature_info, network.get_classifier = [{}], lambda: nn.Identity()
        network.forward_intermediates = lambda pixels, indices: (pixels, [pixels])
        layers = LayerStatistics(network, "moments", [0])
        image = features(shape=(1, 3, 6, 6))
        torch.testing.assert_close(layers(image), layers(image.flip(2).transpose(2, 3)))

    @pytest.mark.parametrize(
        ("statistics", "stages", "message"),
        [
            ("mean", [0], "moments or gram, got 'mean'"),
            ("gram", [], r"stages=\[\]: name each of 0..5"),
            ("gram", [6], r"stages=\[6\]"),
            ("gram", [1, 1], r"stages=\[1, 1\]"),
        ],
    )
    def test_wrong_values_are_named(self, statistics, stages, message):
        with pytest.raises(ValueError, match=message):
            lite0_backbone("random", 32, statistics=statistics, stages=stages)


class TestColour:
    def test_lab_of_known_colours(self):
        known = {  # sRGB under D65, from the CIE formulas worked by hand
            (255, 255, 255): (100.0, 0.0, 0.0),
            (0, 0, 0): (0.0, 0.0, 0.0),
            (255, 0, 0): (53.24, 80.09, 67.20),
            (0, 255, 0): (87.73, -86.18, 83.18),
            (0, 0, 255): (32.30, 79.19, -107.86),
            (128, 128, 128): (53.59, 0.0, 0.0),
            (10, 10, 10): (2.74, 0.0, 0.0),
        }
        rgb = torch.tensor(list(known)).T[None, :, None].float() / 255
        found = lab(rgb)[0, :, 0].T
        torch.testing.assert_close(found, torch.tensor(list(known.values())), rtol=0, atol=0.02)

    def test_soft_bins_share_between_neighbours(self):
        found = soft_bins(torch.tensor([-5.0, 0.0, 2.5, 10.0, 16.0, 99.0]), (0.0, 10.0, 20.0))
        expected = [[1, 0, 0], [1, 0, 0], [0.75, 0.25, 0], [0, 1, 0], [0, 0.4, 0.6], [0, 0, 1]]
        torch.testing.assert_close(found, torch.tensor(expected))

    def test_shares_of_single_colours(self):
        # L 50 between two centres; chroma 20 at 90 degrees: second hue of four, lower chroma
        colours = torch.tensor([[50.0, 0.0, 20.0], [0.0, 0.0, 0.0], [100.0, -35.0, 0.0]]).T[None, :, None]
        found = colour_shares(colours, (25.0, 75.0), (20.0, 50.0), 4)[0, :, 0].T
        assert found.shape == (3, 18)
        torch.testing.assert_close(found.sum(1), torch.ones(3))
        assert found[0].nonzero()[:, 0].tolist() == [2, 11]  # 1 + hue 1, in both lightnesses
        torch.testing.assert_close(found[0, [2, 11]], torch.tensor([0.5, 0.5]))
        assert found[1].argmax() == 0
        torch.testing.assert_close(found[2, [9 + 1 + 2, 9 + 5 + 2]], torch.tensor([0.5, 0.5]))

    def test_hues_next_to_the_seam_share_the_first_bin(self):
        angles = torch.tensor([-0.1, 0.1])
        colours = torch.stack([torch.tensor([50.0, 50.0]), 50 * angles.cos(), 50 * angles.sin()])[None, :, None]
        found = colour_shares(colours, (50.0, 60.0), (50.0,), 8)[0, :, 0]
        assert (found[1] > 0.85).all()
        assert found[8, 0] == pytest.approx(0.1 * 8 / (2 * math.pi), abs=1e-4)
        assert found[2, 1] == pytest.approx(0.1 * 8 / (2 * math.pi), abs=1e-4)

    def test_pyramid_is_the_mean_bhattacharyya_coefficient(self):
        first, second = (torch.rand(1, 4, 6, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
        first, second = first / first.sum(1, keepdim=True), second / second.sum(1, keepdim=True)
        found = float((hellinger_pyramid(first, (1, 2)) * hellinger_pyramid(second, (1, 2))).sum())

        def coefficient(y: slice, x: slice) -> float:
            p, q = (s[0, :, y, x].mean((1, 2)) for s in (first, second))
            return float((p * q).sqrt().sum())

        halves = [slice(0, 3), slice(3, 6)]
        cells = [coefficient(y, x) for y in halves for x in halves]
        expected = (coefficient(slice(None), slice(None)) + sum(cells) / 4) / 2
        assert found == pytest.approx(expected, abs=1e-6)

    def test_layout_tells_colour_from_place(self):
        left = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        left[:, 0, :, :32] = 255  # red on black, then black on red
        right, blue = left.flip(3), left.flip(1)

        def similarity(levels: list[int], other: torch.Tensor) -> float:
            backbone = colour_backbone(levels=levels)
            return float((backbone(left) * backbone(other)).sum())

        assert similarity([1], right) == pytest.approx(1.0, abs=1e-5)
        assert similarity([3], right) < 0.6
        assert similarity([1], blue) < 0.6

    @pytest.mark.parametrize("shape", [(64, 64), (64, 1), (2, 64), (17, 31)])
    def test_any_shape_has_norm_1(self, shape):
        image = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
        found = colour_backbone(fit="longest")(image)
        assert found.shape == (2, 680, 1, 1)
        torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(2))

    def test_wrong_levels_are_named(self):
        with pytest.raises(ValueError, match=r"levels=\[0\]"):
            ColourLayout([0])
