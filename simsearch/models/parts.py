"""Descriptors of several parts, such as content, style and colour, whose weights may change with each query."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simsearch.functional.heat_map import regrid
from simsearch.functional.ragged import by_shape
from simsearch.models.backbones import WeightsError, load_state, state_fingerprint
from simsearch.models.frozen import FrozenRetriever
from simsearch.models.steps import DescribesBatches
from simsearch.types import Batch, Encoder, Fit, HeatMap, Part, can_explain

_AT_ONCE = 64  # images at a time in any batch, since shallow maps are large


class TrainedPart(nn.Module):
    """A trained network, used unchanged for one part of a descriptor. `load` takes its tensors from a run.

    The checkpoint of the whole model and a catalog also hold the tensors, so neither needs the run again.

    Args:
        network: A network as in simsearch.models.trained.Network, with L2-normalised descriptors.
        start: A run directory or checkpoint of `simsearch train`. None if the tensors are loaded from elsewhere.

    Raises:
        ValueError: If the network gives codes.
    """

    bits = None
    network: Encoder

    def __init__(self, network: Encoder, start: str | None) -> None:
        super().__init__()
        if network.bits is not None:
            raise ValueError(
                f"the network in {start} gives codes of {network.bits} bits, which cannot be joined to descriptors: "
                "choose a run of model=dir"
            )
        self.network, self.start = network.requires_grad_(False).eval(), start
        self.dimension = network.dimension

    def load(self) -> None:
        """Loads the tensors of `start`.

        Raises:
            WeightsError: If they are missing or do not fit.
        """
        if self.start is None:
            raise WeightsError("model.encoders: a trained part needs its run: set its start")
        path = Path(self.start)
        file = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
        state = {n.removeprefix("network."): v for n, v in load_state(file).items() if n.startswith("network.")}
        try:
            self.network.load_state_dict(state)
        except RuntimeError as error:
            raise WeightsError(f"the tensors in {file} are not those of this network: {error}") from error
        sha256 = state_fingerprint(self.network)[:32]
        self.provenance = {**self.provenance, "weights": "trained", "start": self.start, "sha256": sha256}

    def embed(self, image: Tensor) -> Tensor:
        """L2-normalised descriptors float32 (B, dimension).

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.
        """
        with torch.autocast(image.device.type, enabled=False):
            return self.network.embed(image).float()

    def describe_batch(self, batch: Batch) -> Tensor:
        """Descriptors of a batch, in its order.

        Args:
            batch: The batch.
        """
        return by_shape(self.embed, batch["image"], _AT_ONCE)

    def train(self, mode: bool = True) -> TrainedPart:
        """Keeps the module in evaluation mode.

        Args:
            mode: Ignored.
        """
        return super().train(False)

    @property
    def explains(self) -> bool:
        """Whether `heat_map` can show which places of an image a similarity comes from."""
        return can_explain(self.network)

    def heat_map(self, image: Tensor, vector: Tensor) -> HeatMap:
        """The heat map of the network. It needs `explains` to be True.

        Args:
            image: uint8 or float (3, H, W) in 0..255.
            vector: Descriptor float32 (dimension,).
        """
        return self.network.heat_map(image, vector)  # type: ignore[attr-defined]

    @property
    def input_size(self) -> int:
        """Size in pixels to which files are best decoded."""
        return self.network.input_size

    @property
    def fit(self) -> Fit:
        """The part of an image that is used: its centre square ("square"), or the whole image ("longest")."""
        return self.network.fit

    @property
    def provenance(self) -> dict[str, str]:
        """Plain facts about the weights."""
        return self.network.provenance

    @provenance.setter
    def provenance(self, facts: dict[str, str]) -> None:
        self.network.provenance = facts

    def identity(self) -> dict[str, object]:
        """Everything besides the tensors that determines the descriptors, as plain values."""
        return self.network.identity()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["backbone"] = dict(self.provenance)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.provenance = dict(checkpoint["backbone"])


class PartsRetriever(DescribesBatches):
    """Descriptors (B, D) of several encoders side by side, each times the square root of its weight.

    The inner product of two descriptors is the sum over parts of weight * cosine. `fit` takes one pass to fit the
    frozen encoders (their whitenings). Trained encoders stay unchanged.

    Args:
        encoders: The encoders, by the names of the parts.
        weights: Weights of the same parts, above 0. They are divided by their sum.

    Raises:
        ValueError: If names or weights do not match, an encoder gives codes, or some encoders see squares and others
            whole images.
    """

    bits = None

    def __init__(self, encoders: Mapping[str, FrozenRetriever | TrainedPart], weights: Mapping[str, float]) -> None:
        super().__init__()
        if not encoders or set(encoders) != set(weights):
            raise ValueError(
                f"model.weights has {', '.join(weights) or 'nothing'}, model.encoders has "
                f"{', '.join(encoders) or 'nothing'}: give each part an encoder and a weight"
            )
        if odd := [name for name in encoders if not name.isidentifier()]:
            raise ValueError(f"model.encoders: {odd[0]!r} is not a valid name of a part: use letters, digits and _")
        for name, weight in weights.items():
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(
                    f"model.weights.{name}={weight} must be positive: to give a part no weight, leave it out"
                )
        for name, encoder in encoders.items():
            if getattr(encoder, "bits", None) is not None:
                raise ValueError(
                    f"model.encoders.{name} gives codes, which cannot be joined: set its binarizer to null"
                )
        if len(fits := {name: encoder.fit for name, encoder in encoders.items()}) and len(set(fits.values())) > 1:
            said = ", ".join(f"{name} {fit}" for name, fit in fits.items())
            raise ValueError(f"all parts must have the same backbone.fit, square or longest, got {said}")
        self.encoders = nn.ModuleDict(encoders)
        total, start = sum(weights.values()), 0
        self.parts: dict[str, Part] = {}
        for name, encoder in encoders.items():
            self.parts[name] = Part(start, start + encoder.dimension, weights[name] / total)
            start += encoder.dimension
        self.dimension = start

    @property
    def members(self) -> dict[str, FrozenRetriever | TrainedPart]:
        """The encoders, by the names of the parts."""
        return dict(self.encoders.items())  # type: ignore[arg-type]

    # Called by searches

    def embed(self, image: Tensor) -> Tensor:
        """L2-normalised descriptors float32 (B, D).

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.
        """
        return self._join({name: encoder.embed(image) for name, encoder in self.members.items()})

    def _join(self, vectors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([math.sqrt(part.weight) * vectors[name] for name, part in self.parts.items()], dim=1)

    @property
    def explains(self) -> bool:
        """Whether `heat_map` can show, for at least one part, which places of an image a similarity comes from."""
        return any(can_explain(encoder) for encoder in self.members.values())

    def heat_map(self, image: Tensor, vector: Tensor) -> HeatMap:
        """Contributions of the places of an image to the inner product of its descriptor with a vector.

        The grid is the finest of the parts that have a heat map. The other parts add to `rest`.

        Args:
            image: uint8 or float (3, H, W) in 0..255.
            vector: Descriptor float32 (D,).
        """
        found, rest = [], 0.0
        for name, part in self.parts.items():
            encoder = self.members[name]
            own = math.sqrt(part.weight) * vector[part.start : part.stop]
            if can_explain(encoder):
                found.append(encoder.heat_map(image, own))
                rest += found[-1].rest
            else:
                rest += float(encoder.embed(image[None])[0] @ own)
        height, width = max((heat.values.shape for heat in found), key=lambda shape: shape[0] * shape[1])
        return HeatMap(torch.stack([regrid(heat.values, (height, width)) for heat in found]).sum(0), rest)

    @property
    def encoder(self) -> Encoder:
        """The module that a catalog keeps."""
        return self

    @property
    def input_size(self) -> int:
        """Size in pixels to which files are best decoded: the largest of the parts."""
        return max(encoder.input_size for encoder in self.members.values())

    @property
    def fit(self) -> Fit:
        """The part of an image that is used: its centre square ("square"), or the whole image ("longest")."""
        return next(iter(self.members.values())).fit

    @property
    def provenance(self) -> dict[str, str]:
        """Plain facts about the weights by `<part>.<fact>`, and `weights` of all, "random" if any part's are."""
        facts = {name: encoder.provenance for name, encoder in self.members.items()}
        weights = dict.fromkeys(fact["weights"] for fact in facts.values())
        flat = {f"{name}.{key}": value for name, fact in facts.items() for key, value in fact.items()}
        return {"weights": "random" if "random" in weights else ", ".join(weights), **flat}

    @provenance.setter
    def provenance(self, facts: dict[str, str]) -> None:
        for name, encoder in self.members.items():
            own = {key.removeprefix(f"{name}."): fact for key, fact in facts.items() if key.startswith(f"{name}.")}
            encoder.provenance = own

    def identity(self) -> dict[str, object]:
        """Everything besides the tensors that determines the descriptors, as plain values."""
        return {
            "family": "parts",
            "weights": {name: part.weight for name, part in self.parts.items()},
            "encoders": {name: encoder.identity() for name, encoder in self.members.items()},
        }

    # Fitting and evaluation under a Trainer: each frozen encoder does its own part, as if it were alone

    def _frozen(self) -> Iterator[FrozenRetriever]:
        return (encoder for encoder in self.members.values() if isinstance(encoder, FrozenRetriever))

    def setup(self, stage: str) -> None:
        for encoder in self.members.values():
            if isinstance(encoder, FrozenRetriever):
                encoder.trainer = self.trainer
                encoder.setup(stage)
            elif stage == "fit" and not self.trainer.ckpt_path:  # otherwise the checkpoint has the tensors
                encoder.load()

    def teardown(self, stage: str) -> None:
        for encoder in self._frozen():
            encoder.teardown(stage)

    def configure_optimizers(self) -> None:
        return None

    def on_train_epoch_start(self) -> None:
        for encoder in self._frozen():
            encoder.on_train_epoch_start()

    def backward(self, loss: Tensor) -> None:
        """Does nothing, since there is no gradient.

        Args:
            loss: Ignored.
        """

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        for encoder in self._frozen():
            encoder.training_step(batch, batch_idx)
        return None if self.trainer.world_size == 1 else torch.zeros((), device=self.device)

    def describe_batch(self, batch: Batch) -> Tensor:
        """Descriptors (B, D) of a batch, in its order, from the stored features if there are any.

        Args:
            batch: The batch.
        """
        return self._join({name: encoder.describe_batch(batch) for name, encoder in self.members.items()})

    # A checkpoint holds the checkpoint of each part, under its name

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept: dict[str, Tensor] = {}
        checkpoint["encoders"] = {}
        for name, encoder in self.members.items():
            own = _below(checkpoint["state_dict"], name)
            encoder.on_save_checkpoint(own)
            kept |= {f"encoders.{name}.{key}": value for key, value in own.pop("state_dict").items()}
            checkpoint["encoders"][name] = own
        checkpoint["state_dict"] = kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, encoder in self.members.items():
            own = {**checkpoint["encoders"][name], **_below(checkpoint["state_dict"], name)}
            encoder.on_load_checkpoint(own)
            checkpoint["state_dict"] |= {f"encoders.{name}.{key}": v for key, v in own["state_dict"].items()}


def _below(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The tensors of one part, as a separate checkpoint."""
    prefix = f"encoders.{name}."
    return {"state_dict": {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}}
