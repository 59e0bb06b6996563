"""The small network for 32 pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
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
    network = CIFARNetwork((32, 128, 128))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 128, 3, 3)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 6
    # 3 x 3 convolutions without bias, and a shift for each of the 6 normalisations.
    pairs = [(24, 32), (32, 32), (32, 128), (128, 128), (128, 128), (128, 128)]
    expected = sum(9 * a * b + b for a, b in pairs)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == expected


def test_convolutions_start_as_the_identity():
    layer = next(m for m in CIFARNetwork((24, 96, 96)).modules() if isinstance(m, nn.Conv2d))
    x = torch.randn(1, 24, 5, 5)
    torch.testing.assert_close(layer(x), x)


def test_three_convolutions_close_a_residual():
    torch.manual_seed(0)
    backbone = cifar_backbone([24, 32, 40], convolutions=3)
    network = backbone.network.train()
    assert backbone.channels == 40
    pixels = torch.randn(4, 3, 32, 32)
    maps = F.gelu(network.patches(pixels))
    convolutions = iter(m.weight for m in network.layers.modules() if isinstance(m, nn.Conv2d))

    def normed(maps):  # over the batch; shifts are 0 before training
        return (maps - maps.mean((0, 2, 3), True)) / maps.var((0, 2, 3), unbiased=False, keepdim=True).sqrt()

    for _ in range(3):
        maps = F.max_pool2d(F.conv2d(maps, next(convolutions), padding=1), 2)
        start = maps = F.gelu(normed(maps))
        maps = F.gelu(normed(F.conv2d(maps, next(convolutions), padding=1)))
        maps = F.gelu(start + normed(F.conv2d(maps, next(convolutions), padding=1)))
    torch.testing.assert_close(network(pixels), maps, atol=1e-4, rtol=1e-3)


def test_old_checkpoints_open_with_a_single_width():
    """Names and shapes of the tensors, and the name in results, are those of runs made before there were forms."""
    backbone = cifar_backbone(24)
    assert backbone.name == "cifar/24"
    shapes = {n: tuple(t.shape) for n, t in backbone.network.state_dict().items() if n.startswith("layers.7.")}
    assert shapes == {"layers.7.weight": (96, 24, 3, 3)}
    assert [n for n, _ in backbone.network.named_parameters() if n.endswith("weight")] == [
        *(f"layers.{i}.weight" for i in (0, 2, 4, 5, 7, 9, 11, 12, 14, 16, 18, 19))
    ]
    assert cifar_backbone([24, 96, 96]).name == "cifar/24-96-96"
    assert cifar_backbone([24, 96, 96], convolutions=3).name == "cifar/24-96-96/3"


def test_backbone_prepares_its_patches_from_training_images():
    backbone = cifar_backbone(24)
    images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)
    before = backbone.network.patches.weight.clone()
    backbone.prepare(images, torch.arange(len(images)))
    assert not torch.equal(before, backbone.network.patches.weight)
    assert backbone(images).shape == (50, 96, 3, 3)
    assert backbone.provenance["weights"] == "random"


@pytest.mark.parametrize("count", [50, 5000, 9999, 14999, 50000])
def test_patches_are_of_images_from_all_over_the_training_set(count, monkeypatch):
    backbone, seen = cifar_backbone(24), []
    monkeypatch.setattr(backbone, "preprocess", lambda images: images)
    monkeypatch.setattr(backbone.network, "prepare", seen.append)
    backbone.prepare(torch.arange(count).view(-1, 1, 1, 1), torch.arange(count))
    (rows,) = seen
    assert len(rows) <= 5000
    assert int(rows.diff(dim=0).max()) <= -(-count // 5000)
    assert int(rows[-1]) >= count - -(-count // 5000)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"width": 8}, "width=8"),
        ({"width": [24, 96]}, "three numbers"),
        ({"width": [64, 32, 32]}, "none below"),
        ({"convolutions": 4}, "convolutions=4"),
        ({"weights": "package"}, "package"),
    ],
)
def test_wrong_values(arguments, match):
    with pytest.raises(ValueError, match=match):
        cifar_backbone(**arguments)
