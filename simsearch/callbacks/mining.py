"""The mining pool: the current network describes random training images, and the sampler gets their triplets."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from tqdm import tqdm

from simsearch.functional.mining import draw_triplets, hardest_triplets, semihard_triplets
from simsearch.types import comparable

_PROBE = 256


class TripletMining(pl.Callback):
    """Mines triplets for each epoch of a MinedTriplets sampler from a pool of random training images.

    The current network describes the pool, shared out over the ranks. Two images are alike if the sampler's labels of
    them are equal. A batch draws a query at random, then one of that query's triplets. The callback logs what it mined:
    `mining/active`, the fraction of pool images with a triplet within the margin, and `mining/loss`, the mean loss of
    these triplets. Before it mines again it logs how stale the triplets have become: `mining/staleness`, the mean
    distance between the old and the current descriptors of 256 pool images, and `mining/age`, the steps since they were
    mined. A resumed run continues with its triplets.

    Mining raises ValueError if descriptors hold NaN or infinity (the message names step and images), and if no triplet
    lies within the margin.

    Args:
        pool: Number of images in the pool.
        per_query: Number of triplets kept for each query.
        margin: Margin of the loss, above 0.
        select: "hardest" keeps the hardest triplets of each query and suits labels that name one object. "semihard"
            keeps semi-hard ones and suits classes.
        batch_size: Number of images described at once.
        seed: With the epoch it determines pool and draw, which are equal on all ranks.

    Raises:
        ValueError: If `pool`, `per_query` or `batch_size` is below 1, or `select` is unknown.

    Source:
        Gordo, Almazán, Revaud, Larlus: Deep Image Retrieval: Learning global representations for image search. ECCV
        2016. It uses a pool of 5,000 images and 25 triplets a query.
    """

    def __init__(
        self,
        pool: int = 5000,
        per_query: int = 25,
        margin: float = 0.1,
        select: Literal["hardest", "semihard"] = "hardest",
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        for name, value in (("pool", pool), ("per_query", per_query), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"callbacks.mining.{name}={value} is too small: use 1 or more")
        if select not in ("hardest", "semihard"):
            raise ValueError(f"callbacks.mining.select={select!r}: choose hardest or semihard")
        self.pool, self.per_query, self.margin, self.select = pool, per_query, margin, select
        self.batch_size, self.seed = batch_size, seed
        self.step = 0
        self._probe: tuple[Tensor, Tensor] | None = None  # collection rows, and their descriptors at the time of mining

    def state_dict(self) -> dict[str, Any]:
        rows, vectors = self._probe or (torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0))
        return {"step": self.step, "rows": rows, "vectors": vectors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]
        self._probe = (state_dict["rows"], state_dict["vectors"]) if len(state_dict["rows"]) else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mine(trainer, pl_module)  # after a resume from an epoch's end no epoch start is reported

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mine(trainer, pl_module)

    def _mine(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sampler = trainer.train_dataloader.sampler  # type: ignore[union-attr]
        if not hasattr(sampler, "set_triplets"):
            raise ValueError("the mining callback needs the sampler that takes its triplets: sampler=mined")
        if not sampler.needs_triplets:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + sampler.epoch)
        place = torch.randperm(len(data.split.train), generator=generator)[: self.pool]
        rows = data.split.train[place]
        self._log_staleness(trainer, pl_module)
        vectors = self._describe(trainer, pl_module, rows)
        bad = rows[~comparable(vectors)]
        if len(bad):  # on every rank, since each has all vectors
            raise ValueError(
                f"{len(bad)} of the {len(rows)} descriptors of the mining pool hold NaN, infinity or numbers near "
                f"them at step {trainer.global_step} (epoch {trainer.current_epoch}, collection rows "
                f"{bad[:8].tolist()}): lower optimizer.lr, clip gradients (trainer.gradient_clip_val=1), or use "
                "precision 32; the last checkpoint is from before this step"
            )
        labels = sampler.labels[place]
        mined = None
        if trainer.is_global_zero:  # rounding may differ between machines: one decides for all
            if self.select == "hardest":
                mined = hardest_triplets(vectors, labels, margin=self.margin, per_query=self.per_query)
            else:
                own = generator.clone_state()  # the generator of the draw below must be equal on all ranks
                mined = semihard_triplets(vectors, labels, margin=self.margin, per_query=self.per_query, generator=own)
        triplets, losses = trainer.strategy.broadcast(mined)  # type: ignore[misc]
        if len(triplets) == 0:
            raise ValueError(
                f"no triplet of the {len(rows)} images in the pool is within the margin {self.margin}: the network "
                "separates them all: stop here, or raise loss.margin or callbacks.mining.pool"
            )
        sampler.set_triplets(place[draw_triplets(triplets, sampler.wanted, generator)])
        self.step = trainer.global_step
        self._probe = rows[:_PROBE].clone(), vectors[:_PROBE].clone()
        active = len(triplets[:, 0].unique()) / len(rows)
        self._log(trainer, {"mining/active": active, "mining/loss": float(losses.mean())})

    def _log_staleness(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._probe is not None:
            rows, old = self._probe
            new = self._describe(trainer, module, rows)
            drift = float((new - old).norm(dim=1).mean())
            age = float(trainer.global_step - self.step)
            self._log(trainer, {"mining/staleness": drift, "mining/age": age})

    @staticmethod
    def _log(trainer: pl.Trainer, values: dict[str, float]) -> None:
        for logger in trainer.loggers:  # Lightning's own log has no place at the start of training
            logger.log_metrics(values, step=trainer.global_step)

    def _describe(self, trainer: pl.Trainer, module: pl.LightningModule, rows: Tensor) -> Tensor:
        """Descriptors of collection rows on the CPU, float32 (N, D). Each rank describes its share."""
        images = trainer.datamodule.collection.images  # type: ignore[attr-defined]
        world, rank = trainer.world_size, trainer.global_rank
        share = -(-len(rows) // world)
        own = rows[rank * share : (rank + 1) * share]
        own = torch.cat([own, rows[: share - len(own)]])  # equal shares for the gather
        modes = [(child, child.training) for child in module.modules()]
        module.eval()
        parts = []
        with torch.no_grad(), tqdm(total=len(own), desc="mining pool", unit="img", leave=False) as bar:
            for some in own.split(self.batch_size):
                batch = {"image": images[some].to(module.device), "index": some}
                parts.append(module(batch)[:, : module.learnt].float())  # what the loss sees
                bar.update(len(some))
        for child, training in modes:
            child.training = training
        vectors = torch.cat(parts)
        if world > 1:
            vectors = module.all_gather(vectors).flatten(0, 1)  # type: ignore[union-attr]
        return vectors.cpu()[: len(rows)]
