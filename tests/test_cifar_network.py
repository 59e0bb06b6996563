"""The small network for 32 pixels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simsearch.models.cifar import CIFARNetwork, WhitenedPatches, cifar_backbone


def test_patches_are_whitened_and_come_with_both_signs():
    torch.manual_seed(0)
    mix = torch.randn(3, 3)
    pixels = torch.einsum("dc,ncij->ndij", mix, torch.randn(400, 3, 6, 6))
    layer = WhitenedPatches()
    layer.prepare(pixels, shrinkage=0.0)
    out = layer(pixels)
    assert out.shape == (400, 24, 5, 5)
    rows = out[:, :12].permute(0, 2, 3, 1).reshape(-1, 12).double()
    moment = rows.T @ rows / len(rows)
    torch.testing.assert_close(moment, torch.eye(12).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(out[:, 12:], -out[:, :12])
    assert not list(layer.parameters())


def test_shapes_and_what_learns():
    network = CIFARNetwork(32)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 128, 3, 3)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 6
    # 3 x 3 convolutions without bias, and a shift for each of the 6 normalisations.
    pairs = [(24, 32), (32, 32), (32, 128), (128, 128), (128, 128), (128, 128)]
    expected = sum(9 * a * b + b for a, b in pairs)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == expected


def test_convolutions_start_as_the_identity():
    layer = next(m for m in CIFARNetwork(24).modules() if isinstance(m, nn.Conv2d))
    x = torch.randn(1, 24, 5, 5)
    torch.testing.assert_close(layer(x), x)


def test_backbone_prepares_its_patches_from_training_images():
    backbone = cifar_backbone(24)
    images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)
    before = backbone.network.patches.weight.clone()
    backbone.prepare(images)
    assert not torch.equal(before, backbone.network.patches.weight)
    assert backbone(images).shape == (50, 96, 3, 3)
    assert backbone.provenance["weights"] == "random"


@pytest.mark.parametrize(("arguments", "match"), [({"width": 8}, "width=8"), ({"weights": "package"}, "package")])
def test_wrong_values(arguments, match):
    with pytest.raises(ValueError, match=match):
        cifar_backbone(**arguments)
