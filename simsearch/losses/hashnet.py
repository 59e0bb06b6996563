"""The pairwise likelihood loss of HashNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HashNetLoss(nn.Module):
    """The weighted negative log-likelihood over all pairs of a batch of real-valued codes.

    With h = tanh(beta u), a pair costs log(1 + exp(alpha <h_i, h_j>)) - alpha s_ij <h_i, h_j>, where s_ij is 1 for a
    pair of one class and 0 otherwise. Similar pairs have the weight S / S1 and dissimilar pairs S / S0, counted in the
    batch. The sum over the pairs i < j is divided by their number S. The result is the mean over similar pairs plus the
    mean over dissimilar pairs.

    beta = (1 + growth t)^(1/2) grows with the number t of training batches, so that tanh approaches the sign. t is a
    buffer: a resumed run continues with its beta.

    The authors' release uses the same alpha, in both terms, and the same beta, but raises beta only every 200 steps.
    Other differences:

    - The paper counts S, S1 and S0 in the whole training set.
    - The release weights similar pairs by a constant for each data set (`class_num`). Its function
      `pairwise_loss_updated`, which its training does not call, counts them in the batch as we do, without alpha.
    - The release divides by the sum of the weights, pairs two batches with each other, and drops the logarithm where
      alpha <h_i, h_j> > 15.
    - Common re-implementations pair a batch with the stored outputs of all training images.

    Args:
        alpha: Scale of the inner products, above 0. None gives 10 / b.
        growth: Growth of beta per training batch, 0 or more. With 0, beta stays 1.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Cao, Long, Wang, Yu: HashNet: Deep Learning to Hash by Continuation. ICCV 2017, eq. 4.

    Example:
        >>> loss = HashNetLoss()
        >>> loss(torch.zeros(2, 4), torch.tensor([0, 0]))  # log 2: the inner product is 0
        tensor(0.6931)
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
        """The current slope of tanh, a scalar."""
        return (1 + self.growth * self.step).sqrt()

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar. In training mode the call counts as a step of beta.

        Args:
            embeddings: Floating point (B, b), real-valued codes.
            labels: int64 (B,).
        """
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
