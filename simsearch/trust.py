"""Treats untrusted folders as data: limits what their configs may name, and where their paths may lead.

A config with `_target_` calls whatever it names, with arguments of its choice. Therefore a config from a folder may
only build objects in ALLOWED, unless the user says that the folder is trusted (`trust=true`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simsearch.errors import SimsearchError

# What the configs of `simsearch train` name, each where it can be imported from, and nothing that runs what its
# arguments name. A new class comes here with its yaml. What else a user's config names needs trust=true.
ALLOWED = frozenset(
    {
        "pytorch_lightning.Trainer",
        "pytorch_lightning.callbacks.EarlyStopping",
        "pytorch_lightning.callbacks.LearningRateMonitor",
        "pytorch_lightning.callbacks.ModelCheckpoint",
        "pytorch_lightning.callbacks.TQDMProgressBar",
        "pytorch_metric_learning.losses.ContrastiveLoss",
        "pytorch_metric_learning.losses.MultiSimilarityLoss",
        "pytorch_metric_learning.losses.NTXentLoss",
        "pytorch_metric_learning.losses.TripletMarginLoss",
        "pytorch_metric_learning.miners.TripletMarginMiner",
        "simsearch.cache.ArrayCache",
        "simsearch.callbacks.evaluation.RetrievalEvaluation",
        "simsearch.callbacks.mining.TripletMining",
        "simsearch.callbacks.neighbours.NeighbourFigure",
        "simsearch.callbacks.precision_recall.PrecisionRecall",
        "simsearch.callbacks.training.EpochsAfterResume",
        "simsearch.callbacks.training.FrozenBackbone",
        "simsearch.callbacks.training.LastCheckpoint",
        "simsearch.callbacks.training.LastValidation",
        "simsearch.callbacks.training.Lookahead",
        "simsearch.callbacks.training.SaveOnSigterm",
        "simsearch.callbacks.training.StepSeed",
        "simsearch.callbacks.training.Throughput",
        "simsearch.callbacks.training.WeightAverage",
        "simsearch.data.copies.RandomCopies",
        "simsearch.data.datamodule.CIFAR10DataModule",
        "simsearch.data.datamodule.RenderedDataModule",
        "simsearch.data.image_folder.FilesDataModule",
        "simsearch.data.protocols.ByAttribute",
        "simsearch.data.protocols.ByHash",
        "simsearch.data.protocols.OfficialSplit",
        "simsearch.data.protocols.SampledSplit",
        "simsearch.data.protocols.UnseenClasses",
        "simsearch.data.samplers.MinedTriplets",
        "simsearch.data.samplers.PKBatches",
        "simsearch.data.samplers.ShuffledBatches",
        "simsearch.data.samplers.ViewBatches",
        "simsearch.data.transforms.AlternatingCropFlip",
        "simsearch.data.transforms.RandomCropFlip",
        "simsearch.evaluation.class_means.ClassMeans",
        "simsearch.evaluation.instance.Instance",
        "simsearch.evaluation.open_set.OpenSet",
        "simsearch.index.auto.AutoIndex",
        "simsearch.index.binarize.ITQ",
        "simsearch.index.binarize.Sign",
        "simsearch.index.faiss_index.FaissIndex",
        "simsearch.losses.attributes.MultiAttribute",
        "simsearch.losses.classification.ClassificationLoss",
        "simsearch.losses.dsh.DSHLoss",
        "simsearch.losses.greedyhash.GreedyHashLoss",
        "simsearch.losses.hashnet.HashNetLoss",
        "simsearch.losses.memory.CrossBatchMemory",
        "simsearch.losses.mined.MinedLoss",
        "simsearch.losses.normalised_softmax.NormalisedSoftmaxLoss",
        "simsearch.losses.orthohash.OrthoHashLoss",
        "simsearch.losses.spread.SpreadLoss",
        "simsearch.losses.triplet.BatchHardTripletLoss",
        "simsearch.losses.triplet.TripletLoss",
        "simsearch.functional.sift.Sift",
        "simsearch.models.backbones.lite0_backbone",
        "simsearch.models.backbones.timm_backbone",
        "simsearch.models.backbones.torchvision_backbone",
        "simsearch.models.cifar.cifar_backbone",
        "simsearch.models.colour.colour_backbone",
        "simsearch.models.dir.RegionNetwork",
        "simsearch.models.dsh.DSHNetwork",
        "simsearch.models.frozen.FrozenRetriever",
        "simsearch.models.frozen.LearnedWhitening",
        "simsearch.models.frozen.Whitening",
        "simsearch.models.hashing.HashNetwork",
        "simsearch.models.hashing.PooledBackbone",
        "simsearch.models.onnx_model.onnx_backbone",
        "simsearch.models.parts.PartsRetriever",
        "simsearch.models.parts.TrainedPart",
        "simsearch.models.pooling.Average",
        "simsearch.models.pooling.GeM",
        "simsearch.models.pooling.MAC",
        "simsearch.models.pooling.RMAC",
        "simsearch.models.trained.TrainedRetriever",
        "simsearch.search.rerank.AQE",
        "simsearch.search.rerank.AlphaQE",
        "simsearch.search.rerank.CSLS",
        "simsearch.search.rerank.DBA",
        "simsearch.search.rerank.Diffusion",
        "simsearch.search.rerank.KReciprocal",
        "simsearch.search.rerank.SuperGlobal",
        "simsearch.search.stores.milvus.Milvus",
        "simsearch.search.stores.pgvector.Pgvector",
        "simsearch.search.verification.Verification",
        "torch.optim.AdamW",
        "torch.optim.SGD",
        "torch.optim.lr_scheduler.ConstantLR",
        "torch.optim.lr_scheduler.MultiStepLR",
        "torch.optim.lr_scheduler.OneCycleLR",
        "torch.optim.lr_scheduler.ReduceLROnPlateau",
        "torch.optim.lr_scheduler.StepLR",
    }
)
# Where classes that older runs and users' configs name are now.
MOVED = {"simsearch.data.files.FilesDataModule": "simsearch.data.image_folder.FilesDataModule"}
VERIFIERS = frozenset(t for t in ALLOWED if t.startswith(("simsearch.functional.", "simsearch.search.verification.")))
ENCODERS = frozenset(t for t in ALLOWED if t.startswith(("simsearch.models.", "simsearch.index.binarize.")))

# Arguments with which an allowed target would write elsewhere or upload its output. A run has its own folder.
_REFUSED = {
    "pytorch_lightning.Trainer": ("callbacks", "default_root_dir", "logger", "model_registry", "plugins"),
    "pytorch_lightning.callbacks.ModelCheckpoint": ("dirpath",),
}
_HYDRA = ("_args_", "_convert_", "_recursive_")  # how Hydra calls a target; no config of ours says it
_OWN = ("wandb",)  # where W&B keeps links to its own logs; nothing is read from there
_SHOWN = 120
TRUST_HINT = "trust=true (in Python trusted=True) allows it, but it may run code: use it only if you trust the maker"


class Untrusted(SimsearchError, ValueError):
    """The folder would run code or lead out of itself, and the user did not declare it as trusted."""


def check_config(config: Mapping[str, Any], where: str, allowed: frozenset[str] = ALLOWED) -> None:
    """Checks that a plain config holds only plain values and targets in `allowed`.

    Parts that nobody builds are checked too.

    Args:
        config: The plain config.
        where: Where it comes from, for the message.
        allowed: The permitted targets.

    Raises:
        Untrusted: If it holds anything else.
    """
    for key, node in _nodes(config):
        name, what = _fault(node, allowed)
        if what:
            raise Untrusted(f"{where}: {_plain('.'.join(part for part in (key, name) if part))} {what}; {TRUST_HINT}")


def _fault(node: object, allowed: frozenset[str]) -> tuple[str, str]:
    """The offending entry of one value, and the reason. Two empty strings if there is none."""
    if isinstance(node, str) and "${" in node:
        return "", f"holds the interpolation {_short(node)}"
    if not isinstance(node, dict | list | str | int | float | None):
        return "", f"holds a {type(node).__name__}, which is not a plain value"
    if not isinstance(node, dict):
        return "", ""
    target = node.get("_target_")
    if "_target_" in node and (not isinstance(target, str) or target not in allowed):
        return "_target_", f"wants to call {_short(target)}, which is not one of the classes that a run is made of"
    if reserved := next((name for name in _HYDRA if name in node), ""):
        return reserved, "asks Hydra for more than a plain call of its _target_"
    for name in _REFUSED.get(str(target), ()):
        if node.get(name) is not None:
            return name, f"is {_short(node[name])}: a run decides itself where {target} writes"
    if target == "pytorch_lightning.callbacks.ModelCheckpoint" and set("/\\") & set(str(node.get("filename"))):
        return "filename", f"is {_short(node['filename'])}, which leads out of the run's checkpoints"
    return "", ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _plain(key: str) -> str:
    """A key without characters that control a terminal."""
    return key if key.isprintable() else ascii(key)


def follow_moves(config: object) -> None:
    """Renames, in place, each `_target_` that has moved since the config was written (MOVED).

    Args:
        config: The plain config.
    """
    for _, node in built(config):
        if isinstance(target := node["_target_"], str):
            node["_target_"] = MOVED.get(target, target)


def targets(config: object) -> Iterator[tuple[str, object]]:
    """Yields key and value of each `_target_` in a plain config.

    Args:
        config: The plain config.
    """
    for key, node in built(config):
        yield key, node["_target_"]


def built(config: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields key and node of each object that a plain config describes.

    Args:
        config: The plain config.
    """
    for key, node in _nodes(config):
        if isinstance(node, dict) and "_target_" in node:
            yield key, node


def _nodes(config: object) -> Iterator[tuple[str, object]]:
    """Yields each value of a plain config with its full key (`model.encoders.x`, `callbacks.y.z[0]`), outermost first.

    It does not recurse, because an untrusted config may be arbitrarily deep.
    """
    waiting: list[tuple[str, object]] = [("", config)]
    while waiting:
        key, node = waiting.pop()
        yield key, node
        if isinstance(node, dict):
            waiting += [(f"{key}.{name}" if key else str(name), value) for name, value in reversed(node.items())]
        elif isinstance(node, list):
            waiting += [(f"{key}[{i}]", value) for i, value in reversed(list(enumerate(node)))]


def check_links(folder: Path) -> None:
    """Checks that no link in a folder leads out of it. Reading and writing would follow such a link.

    Args:
        folder: The folder.

    Raises:
        Untrusted: If a link does.
    """
    base = os.path.realpath(folder)
    waiting = [base]
    while waiting:
        for entry in _entries(waiting.pop()):
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if os.path.commonpath([base, target]) != base:
                    name = os.path.relpath(entry.path, base)
                    raise Untrusted(
                        f"{folder}: {_plain(name)} is a link that leads out of the folder, to {_short(target)}; "
                        f"{TRUST_HINT}"
                    )
            elif entry.is_dir() and not (entry.name in _OWN and os.path.dirname(entry.path) == base):
                waiting.append(entry.path)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What lies in a folder. Nothing if it has gone: processes that change a catalog or shards remove folders."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
