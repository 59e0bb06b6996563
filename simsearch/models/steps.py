"""What every family does under a Trainer's evaluation."""

from __future__ import annotations

from torch import Tensor, nn

from simsearch.types import Batch, Encoder

try:
    from pytorch_lightning import LightningModule
except ModuleNotFoundError:  # a search describes images by the same module without a Trainer
    LightningModule = nn.Module  # type: ignore[misc,assignment]


class DescribesBatches(LightningModule):
    """A module whose steps outside of training give `describe_batch`: descriptors or real-valued codes (B, D).

    Lightning's where that is installed, which only a Trainer needs (simsearch[train]); else torch's.
    """

    @property
    def encoder(self) -> Encoder:
        """The module that a catalog keeps."""
        raise NotImplementedError

    def describe_batch(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.describe_batch(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.describe_batch(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.describe_batch(batch)
