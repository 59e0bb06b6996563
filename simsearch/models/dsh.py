"""The network of Deep Supervised Hashing (Liu et al. 2016), as in the authors' CIFAR-10 release."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SIDE = 32


def local_response(x: Tensor, alpha: float = 5e-5, beta: float = 0.75) -> Tensor:
    """Responses divided by (1 + alpha * mean of squares in 3 x 3)^beta, separately for each channel, (B, C, H, W).

    This is Caffe's WITHIN_CHANNEL normalisation: zeros beyond the border count in the mean. torch's LocalResponseNorm
    runs across channels instead.

    Args:
        x: Responses float32 (B, C, H, W).
        alpha: Weight of the mean of squares.
        beta: Exponent.
    """
    energy = F.avg_pool2d(x.square(), 3, stride=1, padding=1, count_include_pad=True)
    return x * (1 + alpha * energy).pow(-beta)


class DSHNetwork(nn.Module):
    """Real-valued codes (B, bits) of images (B, 3, 32, 32) in 0..255.

    The network has three 5 x 5 convolutions with pooling in ceil mode, 500 hidden units and `bits` linear outputs:
    597,840 parameters at 12 bits. It subtracts the mean image of the training set, which `prepare` computes. Weights
    are drawn as by Caffe's xavier filler, from U(-sqrt(3 / fan_in), sqrt(3 / fan_in)); biases are 0.

    Args:
        bits: Width of the codes, from 1.

    Raises:
        ValueError: If `bits` is below 1.
    """

    mean: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        if bits < 1:
            raise ValueError(f"model.network.bits={bits}: a code needs at least 1 bit")
        self.bits = self.dimension = bits
        self.input_size, self.fit = _SIDE, "square"
        self.provenance = {"weights": "none", "source": "trained from random weights"}
        self.conv1 = nn.Conv2d(3, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 32, 5, padding=2)
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.hidden = nn.Linear(64 * 4 * 4, 500)
        self.head = nn.Linear(500, bits)
        self.register_buffer("mean", torch.zeros(3, _SIDE, _SIDE))
        for layer in (self.conv1, self.conv2, self.conv3, self.hidden, self.head):
            bound = math.sqrt(3 / layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)

    def prepare(self, images: Tensor, rows: Tensor) -> None:
        """Computes the mean image.

        Args:
            images: All images uint8 (N, 3, 32, 32).
            rows: Rows of the training images, int64 (T,).

        Raises:
            ValueError: If the images have another shape.
        """
        self._check(images)
        total = torch.zeros(3, _SIDE, _SIDE, dtype=torch.float64)
        for some in rows.split(4096):
            total += images[some].sum(0, dtype=torch.int64)
        self.mean.copy_(total / len(rows))

    def forward(self, image: Tensor) -> Tensor:
        """Real-valued codes float32 (B, bits).

        Args:
            image: uint8 or float (B, 3, 32, 32) in 0..255.

        Raises:
            ValueError: If the images have another shape.
        """
        self._check(image)
        x = (image.float() - self.mean).contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(self.conv1(x), 3, stride=2, ceil_mode=True)
        x = local_response(F.relu(x))
        x = F.avg_pool2d(self.conv2(x), 3, stride=2, ceil_mode=True)
        x = local_response(F.relu(x))
        x = F.avg_pool2d(F.relu(self.conv3(x)), 3, stride=2, ceil_mode=True)
        return self.head(F.relu(self.hidden(x.flatten(1))))

    embed = forward

    def identity(self) -> dict[str, object]:
        """Everything besides the tensors that determines the codes, as plain values."""
        return {"family": "dsh", "bits": self.bits}

    @staticmethod
    def _check(image: Tensor) -> None:
        if image.shape[1:] != (3, _SIDE, _SIDE):
            raise ValueError(
                f"the DSH network takes images of 3 x {_SIDE} x {_SIDE}, got {tuple(image.shape[1:])}: "
                "use model=hashing, which has this loss on any backbone (files: data.size=32 data.fit=square)"
            )
