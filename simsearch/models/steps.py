"""The evaluation steps that all families share."""

from __future__ import annotations

from torch import Tensor, nn

from simsearch.types import Batch, Encoder

try:
    from pytorch_lightning import LightningModule
except ModuleNotFoundError:  # a search uses the same module without a Trainer
    LightningModule = nn.Module  # type: ignore[misc,assignment]


class DescribesBatches(LightningModule):
    """A module whose validation, test and prediction steps return `describe_batch`.

    It is a LightningModule if Lightning is installed, which only a Trainer needs (simsearch[train]), else a torch
    module.
    """

    @property
    def encoder(self) -> Encoder:
        """The module that a catalog keeps."""
        raise NotImplementedError

    def describe_batch(self, batch: Batch) -> Tensor:
        """Descriptors or real-valued codes (B, D).

        Args:
            batch: The batch.
        """
        raise NotImplementedError

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.describe_batch(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.describe_batch(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.describe_batch(batch)
