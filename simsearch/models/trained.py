"""The LightningModule of all trained families: a network, a loss, parameter groups, an optimizer."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint as recompute

from simsearch.cache import ArrayCache
from simsearch.functional.gather import gather_rows
from simsearch.functional.ragged import Ragged, by_shape
from simsearch.models.backbones import load_state
from simsearch.models.feature_cache import OnMaps, one_region, pooled_features
from simsearch.models.steps import DescribesBatches
from simsearch.types import Batch, Encoder


class Network(Encoder, Protocol):
    """The torch module of a trained family: an Encoder that training can call.

    `forward` maps images (B, 3, H, W) to (B, D). `provenance` has the facts about the weights that training starts
    from.
    """

    @property
    def head(self) -> nn.Module:
        """The last layer, which may have another learning rate."""
        ...

    def __call__(self, image: Tensor) -> Tensor: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters, as in torch.nn.Module."""
        ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and submodules, as in torch.nn.Module."""
        ...

    def prepare(self, images: Tensor | Ragged, rows: Tensor) -> None:
        """Computes from the training images what is not learnt, such as a mean image or a PCA.

        Args:
            images: All images of the collection, uint8 (N, 3, H, W), perhaps more than fit into memory. They are Ragged
                only if `fit` is "longest".
            rows: Rows of the training images, int64 (T,).
        """


def parameter_groups(
    network: Network,
    loss: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    head_lr: float = 1.0,
    bias_lr: float = 1.0,
    bias_decay: bool = True,
) -> list[dict[str, Any]]:
    """The trainable parameters, grouped by learning rate and weight decay.

    The loss's own parameters have the learning rate of the last layer.

    Args:
        network: The network.
        loss: The loss.
        lr: Learning rate of the body's weights.
        weight_decay: Weight decay.
        head_lr: Factor of the learning rate for the last layer.
        bias_lr: Factor of the learning rate for biases. The bias of the last layer has both factors.
        bias_decay: Whether weight decay also applies to biases and to the scales and shifts of normalisation layers.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    head = {id(p) for p in network.head.parameters()} | {id(p) for p in loss.parameters()}
    for name, parameter in _named(network, loss):
        if not parameter.requires_grad:
            continue
        bias = name.rpartition(".")[2] == "bias"
        rate = lr * (head_lr if id(parameter) in head else 1.0) * (bias_lr if bias else 1.0)
        decay = weight_decay if bias_decay or parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _named(network: Network, loss: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from network.named_parameters()
    yield from loss.named_parameters()


class NonFiniteLoss(ValueError):
    """The loss became NaN or infinite."""


def plateau_monitor(mode: str) -> str:
    """The value that a ReduceLROnPlateau scheduler watches.

    Args:
        mode: "max" for the mAP of the validation, "min" for the training loss.
    """
    return "val/mAP" if mode == "max" else "train/loss"


class TrainedRetriever(DescribesBatches):
    """Trains a network by a loss on whole batches, in the trainer's precision. The loss is float32.

    A loss with `attributes`, a list of names, gets labels (B, A) in the order of these names. The sampler's classes are
    those of the first attribute.

    Images of several shapes (Ragged) pass through the network one shape at a time: the embedding of an image does not
    depend on the others in its batch. Batch normalisation must then be frozen.

    Args:
        network: The network.
        loss: A function of embeddings (B, D) and labels, a scalar.
        optimizer: A partial with `lr` and perhaps `weight_decay`, called with the parameter groups.
        scheduler: A partial called with the optimizer, None for a constant rate. It steps after each optimizer step; a
            ReduceLROnPlateau steps after each validation (mode "max", by val/mAP) or each epoch (mode "min", by the
            epoch's mean of train/loss). Its `max_lr`, if any, is that of the body's weights. `total_steps` below 1
            means the whole training.
        head_lr: As in parameter_groups.
        bias_lr: As in parameter_groups.
        bias_decay: As in parameter_groups.
        start: A run directory or checkpoint. Training starts from its tensors of equal name and shape; a second
            backbone keeps its own, and a binarizer is fitted anew. None for none.
        freeze_batchnorm: Whether batch normalisation stays unchanged with its statistics, which suits small batches.
        slices: Number of images in a slice of the batch, to save memory. Slices go forward without stored activations
            and backward one after another (the streams of Gordo et al. 2016). Gradients are those of the whole batch if
            there is no dropout and batch normalisation is frozen. None for the whole batch at once.
        cache: Trains on a frozen backbone, whose maps of the whole collection are computed once, kept in this cache and
            pooled in memory, averaged over the views of an image if the network has several. With `start`, the backbone
            has the weights of that run. Images cannot be augmented then, and images of several shapes need pooling with
            one region. None for no cache.
        gather: Whether the loss sees the embeddings of all ranks. Its gradient is then that of one large batch.

    Raises:
        ValueError: If the optimizer is not a partial with a learning rate, or the arguments exclude each other.
    """

    network: Network

    def __init__(
        self,
        network: Network,
        loss: nn.Module,
        optimizer: partial,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        head_lr: float = 1.0,
        bias_lr: float = 1.0,
        bias_decay: bool = True,
        start: str | None = None,
        freeze_batchnorm: bool = False,
        slices: int | None = None,
        cache: ArrayCache | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(optimizer, partial) or "lr" not in optimizer.keywords:
            raise ValueError("model.optimizer must be a partial with lr: `_partial_: true` and `lr: 1e-3` in its yaml")
        if not isinstance(lr := optimizer.keywords["lr"], int | float) or not 0 <= lr < math.inf:
            raise ValueError(f"optimizer.lr={lr} is not a learning rate: give a number of at least 0, such as 1e-3")
        if slices is not None and slices < 1:
            raise ValueError(f"model.slices={slices}: give a number of images, or null for the whole batch")
        if slices is not None and not freeze_batchnorm and any(isinstance(m, _BATCHNORM) for m in network.modules()):
            raise ValueError(
                "model.slices needs model.freeze_batchnorm=true: each slice would be normalised separately, "
                "and gradients would not be those of the whole batch"
            )
        if cache is not None:
            if not hasattr(network, "pool"):
                raise ValueError(
                    "model.cache keeps the maps of a backbone, but this network has no backbone: set it to null"
                )
            if getattr(network, "scales", (1.0,)) != (1.0,):
                raise ValueError("model.cache keeps maps of one size: set it to null, or model.network.scales=[1.0]")
            backbone = cast(OnMaps, network).backbone
            if start is None and hasattr(backbone.network, "prepare"):
                raise ValueError(
                    "model.cache keeps the features of a trained backbone, and this one has random weights: name the "
                    "run that trained it in model.start, or train it here with model.cache=null"
                )
            backbone.requires_grad_(False)
            for name, module in network.named_modules():
                if name.endswith("pooling") and any(p.requires_grad for p in module.parameters()):
                    raise ValueError("model.cache keeps pooled features: set pooling.trainable to false")
        if freeze_batchnorm:
            for module in network.modules():
                if isinstance(module, _BATCHNORM):
                    module.requires_grad_(False)
        self.cache = cache
        self._pooled: Tensor | None = None
        self.network, self.loss = network, loss
        self.optimizer, self.scheduler = optimizer, scheduler
        self._losses = torch.zeros(2)  # of this epoch: their sum, and their number
        self._val_map: Tensor | None = None  # of the last validation before a resume
        self.head_lr, self.bias_lr, self.bias_decay = head_lr, bias_lr, bias_decay
        self.start, self.freeze_batchnorm = start, freeze_batchnorm
        self.slices, self.gather = slices, gather
        self.bits = network.bits
        self.dimension = network.dimension
        self.learnt = getattr(network, "learnt", network.dimension)  # further bits are not the loss's
        _ = network.provenance  # hashes the weights before they train
        self._gradients: dict[str, Tensor] = {}  # of a gradient accumulation that a checkpoint interrupted

    @property
    def _on_maps(self) -> OnMaps:
        return cast(OnMaps, self.network)  # true with `cache`, which refuses other networks

    # Called by searches

    @property
    def encoder(self) -> Encoder:
        """The module that a catalog keeps."""
        return self.network

    @property
    def input_size(self) -> int:
        """Size in pixels to which files are best decoded."""
        return self.network.input_size

    @property
    def provenance(self) -> dict[str, str]:
        """Plain facts about the weights, written into every result."""
        start = dict(self.network.provenance)
        start["start"] = start.pop("weights")
        return {"weights": "trained", **start}

    def identity(self) -> dict[str, object]:
        """Everything besides the tensors that determines the embeddings, as plain values."""
        return self.network.identity()

    def embed(self, image: Tensor) -> Tensor:
        """L2-normalised descriptors (B, D) or real-valued codes (B, bits), float32.

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.
        """
        with torch.autocast(self.device.type, enabled=False):
            return self.network.embed(image).float()

    # Training

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1 and not self.gather and _needs_all_ranks(self.loss):
            raise ValueError("this loss needs the embeddings of all ranks: set model.gather=true")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        data.targets = getattr(self.loss, "attributes", None)
        data.whole_batches = True
        if isinstance(data.collection.images, Ragged):
            self._check_ragged(stage)
        resumed = self.trainer.ckpt_path
        begins = stage == "fit" and not resumed
        known = self._start_tensors(Path(self.start)) if begins and self.start is not None else {}
        if self.cache is not None and self._pooled is None:
            if data.augment is not None:
                raise ValueError("data.augment changes images whose maps model.cache keeps: set one of the two to null")
            if self.start is not None and (begins or resumed):  # a model that is only measured has its tensors
                begun = known if begins else self._fitting(Path(str(resumed)))
                self._fill_backbone(begun)
                self.network.load_state_dict(begun, strict=False)  # of the pooling, too
            self.network.to(self.trainer.strategy.root_device)
            self._pooled = pooled_features(cast(OnMaps, self.network.eval()), data.collection, self.cache)
        if not begins:
            return  # the checkpoint of a resumed run has all this
        self.network.load_state_dict(known, strict=False)  # `prepare` may depend on these tensors
        self.network.to(self.trainer.strategy.root_device)
        if self._pooled is not None and hasattr(self.network, "prepare_regions"):
            self.network.prepare_regions(self._pooled, data.split.train)
        else:
            self.network.prepare(data.collection.images, data.split.train)
        self.network.load_state_dict(known, strict=False)
        if self.start is not None:
            self.network.provenance = {**self.network.provenance, "weights": self.start}

    def _check_ragged(self, stage: str) -> None:
        if self.network.fit != "longest":
            raise ValueError(
                "the images have many shapes (data.fit=longest), but the network takes squares: use "
                "backbone.fit=longest, or data.fit=square"
            )
        if self.cache is not None and not one_region(self._on_maps.pool, self._on_maps.backbone):
            raise ValueError(
                "model.cache keeps the same number of regions for each image: set it to null, or data.fit=square, or "
                "choose a pooling with one region"
            )
        trains = stage == "fit" and not self.freeze_batchnorm and self.cache is None
        if trains and any(isinstance(m, _BATCHNORM) for m in self.modules()):
            raise ValueError(
                "images of many shapes (data.fit=longest) go through the network shape by shape, and batch "
                "normalisation would see each shape separately: set model.freeze_batchnorm=true, or data.fit=square"
            )

    def on_fit_start(self) -> None:
        self.train()  # the trainer keeps the mode it finds, including frozen layers

    def on_train_start(self) -> None:
        for name, parameter in self.named_parameters():
            if name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter.device)
        self._gradients = {}

    def _start_tensors(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a run or checkpoint that fit the network. Raises ValueError if none does."""
        file = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
        fits = self._fitting(file)
        if not any(n in dict(self.network.named_parameters()) for n in fits):
            raise ValueError(
                f"model.start: no tensor of {file} fits this network: give a run or checkpoint of simsearch train; "
                "other pretrained weights go to backbone.weights="
            )
        new = sorted(name for name in set(self.network.state_dict()) - set(fits) if not name.startswith(_OWN))
        if self.trainer.is_global_zero:
            print(f"starting from {file}: {len(fits)} tensors; new: {', '.join(new[:4]) or 'none'}", file=sys.stderr)
        return fits

    def _fitting(self, file: Path) -> dict[str, Tensor]:
        """The tensors in a checkpoint of a name and shape that the network has."""
        saved = {n.removeprefix("network."): v for n, v in load_state(file).items() if not n.startswith("loss.")}
        own = {n: v for n, v in self.network.state_dict().items() if not n.startswith(_OWN)}
        return {n: v for n, v in saved.items() if n in own and own[n].shape == v.shape}

    def _fill_backbone(self, known: Mapping[str, Tensor]) -> None:
        """Gives the frozen backbone the tensors of `start`, before its features are computed.

        Raises ValueError if some are missing.
        """
        backbone = self._on_maps.backbone
        own = backbone.state_dict()
        given = {n.removeprefix("backbone."): v for n, v in known.items() if n.startswith("backbone.")}
        if missing := sorted(set(own) - set(given)):
            raise ValueError(
                f"model.cache keeps the features of a whole backbone, but {len(missing)} of its tensors are not in "
                f"{self.start} or have another shape, first {missing[:3]}: set backbone= as in that run"
            )
        if any(not value.equal(own[name].cpu()) for name, value in given.items()):
            backbone.load_state_dict(given)
            facts = {name: value for name, value in backbone.provenance.items() if name != "sha256"}
            backbone.provenance = facts | {"weights": cast(str, self.start)}

    def train(self, mode: bool = True) -> TrainedRetriever:
        """Sets the mode of the module. A cached backbone and frozen batch normalisation stay in evaluation mode.

        Args:
            mode: True for training, False for evaluation.
        """
        super().train(mode)
        if self.cache is not None:
            self._on_maps.backbone.eval()
        if self.freeze_batchnorm:
            for module in self.network.modules():
                if isinstance(module, _BATCHNORM):
                    module.eval()
        return self

    def configure_optimizers(self) -> Any:
        settings = self.optimizer.keywords
        groups = parameter_groups(
            self.network,
            self.loss,
            lr=settings["lr"],
            weight_decay=settings.get("weight_decay", 0.0),
            head_lr=self.head_lr,
            bias_lr=self.bias_lr,
            bias_decay=self.bias_decay,
        )
        try:
            optimizer = self.optimizer(groups)
            scheduler = None if self.scheduler is None else self._fitted(self.scheduler, groups)(optimizer)
        except (TypeError, ValueError) as error:
            raise ValueError(f"optimizer or scheduler: {error}") from error
        if scheduler is None:
            return optimizer
        # Lightning would step a plateau after last.ckpt is written, and a resume would lose that step.
        about = {"scheduler": scheduler, "interval": "step", "reduce_on_plateau": False}
        return {"optimizer": optimizer, "lr_scheduler": about}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Steps a scheduler that counts steps.

        Args:
            scheduler: The scheduler. A ReduceLROnPlateau waits for `on_train_epoch_end`.
            metric: Not used.
        """
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def on_train_epoch_end(self) -> None:
        trainer = self.trainer
        if not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            return  # a training that is made longer goes on in this epoch
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, ReduceLROnPlateau):
            if scheduler.mode == "min":
                total, count = self._all_losses()
                scheduler.step(float(total / count))
            elif (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
                scheduler.step(float(trainer.callback_metrics.get("val/mAP", self._val_map)))  # type: ignore[arg-type]
        self._losses.zero_()

    def _all_losses(self) -> Tensor:
        """Sum and number of this epoch's losses, (2,), as means over ranks."""
        return self.trainer.strategy.reduce(self._losses.to(self.device, copy=True), reduce_op="mean")

    def _fitted(self, scheduler: Callable[..., Any], groups: list[dict[str, Any]]) -> Callable[..., Any]:
        """A scheduler with the learning rates of the groups and, if it has total_steps, the length of this training."""
        given = getattr(scheduler, "keywords", {})
        if "max_lr" in given:  # a single number would apply to every group
            peak = given["max_lr"] / self.optimizer.keywords["lr"] if self.optimizer.keywords["lr"] else 0.0
            scheduler = partial(scheduler, max_lr=[peak * group["lr"] for group in groups])
        if "total_steps" not in given:
            return scheduler
        steps = given["total_steps"]
        whole = self._trainer is not None and steps == self.trainer.max_steps
        if steps < 1 or whole:  # trainer.max_epochs may end it before
            steps = int(self.trainer.estimated_stepping_batches)
        rise = given.get("pct_start", 0.3)
        if steps * rise < 2:  # torch would divide by a rise of no steps
            what = "stays as it is" if steps < 4 else "rises within 2 of them"
            print(
                f"scheduler: {steps} steps are too few for a rise over {rise:g} of them; the learning rate {what}",
                file=sys.stderr,
            )
            if steps < 4:
                return partial(ConstantLR, factor=1.0)
            rise = 2 / steps
        return partial(scheduler, total_steps=steps, pct_start=rise)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        embeddings, labels = self(batch)[:, : self.learnt].float(), batch["label"]
        if self.gather:
            embeddings, labels = gather_rows(embeddings), gather_rows(labels)
        with torch.autocast(self.device.type, enabled=False):
            loss = self.loss(embeddings, labels)
        if not torch.isfinite(loss):
            rows = batch["index"][:8].tolist()
            raise NonFiniteLoss(
                f"the loss is {loss.item()} at step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx}, "
                f"collection rows {rows} ...): lower optimizer.lr, clip gradients "
                "(trainer.gradient_clip_val=1), or use precision 32; the last checkpoint is from before this step"
            )
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        self._losses = self._losses.to(loss.device)
        self._losses += torch.stack((loss.detach(), torch.ones_like(loss)))
        return loss

    def forward(self, batch: Batch) -> Tensor:
        """Embeddings (B, D) at one scale, in the trainer's precision.

        Args:
            batch: A training batch.
        """
        if self._pooled is not None:
            regions = self._pooled[batch["index"].cpu()].to(self.device).float()
            return self._on_maps.describe(regions)
        network = self.network if self.slices is None else partial(recompute, self.network, use_reentrant=False)
        return by_shape(network, batch["image"], self.slices)

    def describe_batch(self, batch: Batch) -> Tensor:
        """Embeddings float32 (B, D) of a batch, from the stored features if there are any.

        Args:
            batch: The batch.
        """
        if self._pooled is None:
            return by_shape(self.embed, batch["image"])
        with torch.autocast(self.device.type, enabled=False):
            return self(batch).float()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["provenance"] = dict(self.network.provenance)
        checkpoint["losses"] = self._all_losses().cpu()
        checkpoint["val_map"] = self.trainer.callback_metrics.get("val/mAP", self._val_map)
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.processed % self.trainer.accumulate_grad_batches and not progress.is_last_batch:  # type: ignore[attr-defined]
            # Each rank holds its own gradients until the step. Their mean gives the same sum.
            reduce = partial(self.trainer.strategy.reduce, reduce_op="mean")
            grown = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
            checkpoint["gradients"] = {name: reduce(gradient.clone()) for name, gradient in grown.items()}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.network.provenance = dict(checkpoint["provenance"])
        self._gradients = checkpoint.get("gradients", {})
        self._losses = checkpoint.get("losses", self._losses).clone()
        self._val_map = checkpoint.get("val_map")


def _needs_all_ranks(loss: nn.Module) -> bool:
    """Whether a loss, or one inside it, compares with the embeddings of earlier batches of all ranks."""
    return any(getattr(part, "needs_all_ranks", False) for part in loss.modules())


_BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OWN = ("second.", "code_")  # tensors that no start gives: of a second backbone and of the bits that are not learnt
