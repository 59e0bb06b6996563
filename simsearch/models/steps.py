"""What every family does under a Trainer's evaluation."""

from __future__ import annotations

import pytorch_lightning as pl
from torch import Tensor

from simsearch.types import Batch


class DescribesBatches(pl.LightningModule):
    """A module whose steps outside of training give `describe_batch`: descriptors or real-valued codes (B, D)."""

    def describe_batch(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.describe_batch(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.describe_batch(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.describe_batch(batch)
