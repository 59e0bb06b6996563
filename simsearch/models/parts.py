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
from simsearch.types import Batch, Encoder, Fit, HeatMap, Part

_AT_ONCE = 64  # images, however large an evaluation's batch: shallow maps are large


def parts_of(encoder: Encoder) -> dict[str, Part]:
    """The parts of an encoder's descriptors by name, in order of their columns; only `content` where it has none."""
    parts = getattr(encoder, "parts", None)
    return {"content": Part(0, encoder.dimension, 1.0)} if parts is None else dict(parts)


def can_explain(encoder: Encoder | nn.Module) -> bool:
    """Whether an encoder has `heat_map(image, vector)`: its descriptors are sums over regions, at least in a part."""
    return bool(getattr(encoder, "explains", False))


class TrainedPart(nn.Module):
    """A trained network as it is, for one part of a descriptor. `load` takes its tensors from a run.

    network: as simsearch.models.trained.Network, with L2-normalised descriptors. start: a run directory or
    checkpoint that `simsearch train` left. The checkpoint of the whole and a catalog hold the tensors too, so that
    neither needs `start` again: None where the tensors come from there.
    """

    bits = None
    network: Encoder

    def __init__(self, network: Encoder, start: str | None) -> None:
        super().__init__()
        if network.bits is not None:
            raise ValueError(
                f"the network in {start} gives codes of {network.bits} bits, which do not join with descriptors: "
                "choose one of model=dir"
            )
        self.network, self.start = network.requires_grad_(False).eval(), start
        self.dimension = network.dimension

    def load(self) -> None:
        """Loads the tensors of `start`. Raises WeightsError where they are missing or others."""
        if self.start is None:
            raise WeightsError("model.encoders: a trained part needs its run: give its start")
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
        """L2-normalised descriptors float32 (B, dimension) of images (B, 3, H, W)."""
        with torch.autocast(image.device.type, enabled=False):
            return self.network.embed(image).float()

    def describe_batch(self, batch: Batch) -> Tensor:
        """Descriptors of a batch, in its order."""
        return by_shape(self.embed, batch["image"], _AT_ONCE)

    def train(self, mode: bool = True) -> TrainedPart:
        return super().train(False)

    @property
    def explains(self) -> bool:
        """Whether `heat_map` can say where a similarity comes from."""
        return can_explain(self.network)

    def heat_map(self, image: Tensor, vector: Tensor) -> HeatMap:
        """That of the network, where `explains` is True."""
        return self.network.heat_map(image, vector)  # type: ignore[attr-defined]

    @property
    def input_size(self) -> int:
        return self.network.input_size

    @property
    def fit(self) -> Fit:
        return self.network.fit

    @property
    def provenance(self) -> dict[str, str]:
        return self.network.provenance

    @provenance.setter
    def provenance(self, facts: dict[str, str]) -> None:
        self.network.provenance = facts

    def identity(self) -> dict[str, object]:
        return self.network.identity()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["backbone"] = dict(self.provenance)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.provenance = dict(checkpoint["backbone"])


class PartsRetriever(DescribesBatches):
    """Descriptors (B, D) that are several encoders' side by side, each times the square root of its weight.

    The inner product of two is the sum of weight * cosine over parts. `fit` takes one pass for what frozen
    encoders fit (whitenings); trained ones stay as they are. encoders: by the names of the parts. weights: of the
    same parts, above 0; they are divided by their sum.

    Raises ValueError for names or weights that do not fit, for encoders of codes, and where some see squares and
    others whole images.
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
            raise ValueError(f"model.encoders: {odd[0]!r} is no name of a part: use letters, digits and _")
        for name, weight in weights.items():
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"model.weights.{name}={weight} must be positive: leave a part without weight out")
        for name, encoder in encoders.items():
            if getattr(encoder, "bits", None) is not None:
                raise ValueError(f"model.encoders.{name} gives codes, which do not join: set its binarizer to null")
        if len(fits := {name: encoder.fit for name, encoder in encoders.items()}) and len(set(fits.values())) > 1:
            said = ", ".join(f"{name} {fit}" for name, fit in fits.items())
            raise ValueError(f"all parts must see squares, or all whole images (backbone.fit), got {said}")
        self.encoders = nn.ModuleDict(encoders)
        total, start = sum(weights.values()), 0
        self.parts: dict[str, Part] = {}
        for name, encoder in encoders.items():
            self.parts[name] = Part(start, start + encoder.dimension, weights[name] / total)
            start += encoder.dimension
        self.dimension = start

    @property
    def members(self) -> dict[str, FrozenRetriever | TrainedPart]:
        """The encoders by the names of the parts."""
        return dict(self.encoders.items())  # type: ignore[arg-type]

    # What a searcher calls

    def embed(self, image: Tensor) -> Tensor:
        """L2-normalised descriptors float32 (B, D) of images (B, 3, H, W)."""
        return self._join({name: encoder.embed(image) for name, encoder in self.members.items()})

    def _join(self, vectors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([math.sqrt(part.weight) * vectors[name] for name, part in self.parts.items()], dim=1)

    @property
    def explains(self) -> bool:
        """Whether `heat_map` can say where a similarity comes from, of one part at least."""
        return any(can_explain(encoder) for encoder in self.members.values())

    def heat_map(self, image: Tensor, vector: Tensor) -> HeatMap:
        """Contributions of the places of an image (3, H, W) to the inner product of its descriptor with `vector` (D,).

        Those of parts without regions are the rest. On the finest grid of those that have them.
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
        """Side in pixels to which files are best decoded: the largest of the parts."""
        return max(encoder.input_size for encoder in self.members.values())

    @property
    def fit(self) -> Fit:
        """What of an image is seen: its centre square, or the whole at its longest side."""
        return next(iter(self.members.values())).fit

    @property
    def provenance(self) -> dict[str, str]:
        """Plain facts about the weights, by `<part>.<fact>`; `weights` of all, "random" where any are."""
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
        """What decides the descriptors besides the tensors, as plain values."""
        return {
            "family": "parts",
            "weights": {name: part.weight for name, part in self.parts.items()},
            "encoders": {name: encoder.identity() for name, encoder in self.members.items()},
        }

    # Fitting and evaluation under a Trainer: each frozen encoder does its own, as if it were alone

    def _frozen(self) -> Iterator[FrozenRetriever]:
        return (encoder for encoder in self.members.values() if isinstance(encoder, FrozenRetriever))

    def setup(self, stage: str) -> None:
        for encoder in self.members.values():
            if isinstance(encoder, FrozenRetriever):
                encoder.trainer = self.trainer
                encoder.setup(stage)
            elif stage == "fit" and not self.trainer.ckpt_path:  # else the checkpoint has the tensors
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
        """Nothing: there is no gradient."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        for encoder in self._frozen():
            encoder.training_step(batch, batch_idx)
        return None if self.trainer.world_size == 1 else torch.zeros((), device=self.device)

    def describe_batch(self, batch: Batch) -> Tensor:
        """Descriptors (B, D) of a batch, in its order, of its stored features where there are any."""
        return self._join({name: encoder.describe_batch(batch) for name, encoder in self.members.items()})

    # Checkpoints hold what each part's would hold, under its name

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
    """The checkpoint of one part, as yet of its tensors alone."""
    prefix = f"encoders.{name}."
    return {"state_dict": {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}}
