"""The pairwise likelihood of HashNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HashNetLoss(nn.Module):
    """The weighted likelihood of all pairs i < j of a batch, a scalar, from real-valued codes (B, b) and labels (B,).

    With h = tanh(beta u), a pair costs log(1 + exp(alpha <h_i, h_j>)) - alpha s_ij <h_i, h_j>, s_ij = 1
    for one class, else 0. Similar pairs weigh S / S1 and dissimilar ones S / S0, counted in the batch, and
    the sum is divided by the number of pairs S: the mean over similar pairs plus the mean over dissimilar
    ones. beta grows with the count of training forwards t, (1 + growth t)^(1/2), towards the sign; the
    count is a buffer, so that a resumed run goes on with its beta. alpha: 10 / b where None. The authors'
    release has the same alpha, in both terms, and the same beta, but raises it every 200 steps only.

    Departures: the paper counts S, S1 and S0 in the whole training set. The release weighs similar pairs by a
    constant given for each data set (class_num; its own `pairwise_loss_updated`, which its training does not
    call, counts them in the batch as we do, without alpha), divides by the sum of the weights, pairs two
    batches with each other, and drops the logarithm where alpha <h_i, h_j> > 15. Common re-implementations
    pair a batch with the stored outputs of all training images.

    Cao, Long, Wang, Yu 2017, "HashNet: Deep Learning to Hash by Continuation", eq. 4.
    """

    step: Tensor

    def __init__(self, alpha: float | None = None, growth: float = 0.005) -> None:
        super().__init__()
        if alpha is not None and alpha <= 0:
            raise ValueError(f"loss.alpha={alpha} must be positive, or null for 10 / bits")
        if growth < 0:
            raise ValueError(f"loss.growth={growth} must not be negative: 0 keeps tanh as it is")
        self.alpha, self.growth = alpha, growth
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def beta(self) -> Tensor:
        """The present slope of tanh, a scalar."""
        return (1 + self.growth * self.step).sqrt()

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        codes = torch.tanh(self.beta * embeddings)
        if self.training:
            self.step += 1
        alpha = 10 / embeddings.shape[1] if self.alpha is None else self.alpha
        first, second = torch.triu_indices(len(codes), len(codes), offset=1, device=codes.device)
        product = alpha * (codes @ codes.T)[first, second]
        same = (labels[first] == labels[second]).to(product.dtype)
        cost = F.softplus(product) - same * product
        similar = (same * cost).sum() / same.sum().clamp(min=1)
        dissimilar = ((1 - same) * cost).sum() / (1 - same).sum().clamp(min=1)
        return similar + dissimilar
