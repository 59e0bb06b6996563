"""Writes an encoder of descriptors as ONNX files (see simsearch.models.exported)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from simsearch.files import digests, write_json
from simsearch.models.backbones import Backbone
from simsearch.models.dir import RegionNetwork
from simsearch.models.exported import ABOUT, FORMAT, SAMPLES
from simsearch.models.frozen import DescriptorHead, FrozenRetriever, Whitening
from simsearch.models.onnx import OnnxFile, check_shapes, export_after, export_network
from simsearch.models.onnx_model import OnnxModel
from simsearch.models.parts import PartsRetriever, TrainedPart
from simsearch.models.pooling import RMAC
from simsearch.types import Encoder, parts_of

_SAMPLES = 4
_STEPS = (
    "An image is decoded to sRGB: by its ICC profile, if it has a sound one of its colour model, else with its values "
    "as they are; upright by its EXIF orientation; transparent pixels on white; of 16-bit values the upper 8 bits, "
    "32-bit grey stretched from its least to its largest value. It is scaled as `image` says, to uint8. For each part "
    "and each of its scales:",
    "1. scale it again, to the scale's size: fit square takes the centre square, fit longest the whole image with "
    "its longest side at that size, the other rounded half up; bicubic (a = -0.5) with antialiasing, as Pillow "
    "does, rounded to uint8; an image that has the size already stays as it is",
    "2. pixels float32 (B, 3, H, W): (value in 0..255 - mean) / std, per channel R, G, B; where a side is shorter than "
    "min_side, repeat the borders on both sides, the odd pixel after the image",
    "3. run the file: input `pixels`, output `features`: L2-normalised vectors (B, D), or, where the part has a "
    "`head`, maps (B, C, h, w), of which the head makes them: R-MAC regions' maxima, each L2-normalised (with "
    "whiten_regions false: summed and L2-normalised), times weight (D, C) transposed plus bias where the head has a "
    "file, L2-normalised, summed, L2-normalised",
    "4. add the vectors of the part's scales, L2-normalise, multiply by the square root of the part's weight",
    "These, in the columns start..stop of the parts, are the descriptor: the inner product of two is the similarity.",
    "R-MAC regions of a map of sides short <= long: at level l = 1.. squares of side floor(2 short / (l + 1)), l along "
    "the short side and l + n along the long one, their starts spread evenly over what room there is and rounded down. "
    "n = 0 where short = long, else that of 1..6 for which (short^2 - short (long - short) / n) / short^2 is closest "
    "to `overlap`, the least of equals. With `whole` the whole map is one more region.",
)


class Description(nn.Module):
    """L2-normalised descriptors (B, D) of normalised pixels (B, 3, H, W) at one scale, as one module.

    Args:
        network: Maps pixels to feature maps (B, C, h, w).
        head: Maps feature maps to descriptors.
    """

    def __init__(self, network: nn.Module, head: DescriptorHead) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, pixels: Tensor) -> Tensor:
        """L2-normalised descriptors float32 (B, D).

        Args:
            pixels: Normalised images float32 (B, 3, H, W).
        """
        return self.head(self.network(pixels))


def write_exported(folder: Path, encoder: Encoder) -> dict[str, Any]:
    """Writes an ONNX file for each part and size of an encoder, and encoder.json. Returns what encoder.json holds.

    The regions of R-MAC depend on the shape of the image. With fit "longest" the ONNX file therefore ends with the
    maps, and the head's tensors lie beside it.

    Args:
        folder: An existing folder.
        encoder: An encoder of descriptors, on the CPU.

    Raises:
        ValueError: If the encoder gives codes, is of another kind, or has a network that cannot be exported.
    """
    about: dict[str, Any] = {
        "format": FORMAT,
        "steps": _STEPS,
        "image": {"size": encoder.input_size, "fit": encoder.fit},
        "dimension": encoder.dimension,
        "parts": {},
    }
    for name, part in parts_of(encoder).items():
        member = encoder.members[name] if isinstance(encoder, PartsRetriever) else encoder
        about["parts"][name] = {**asdict(part), **_write_part(folder, name, member)}
    about["sha256"] = digests(folder, sorted(path.name for path in folder.iterdir() if path.name != ABOUT))
    write_json(folder / ABOUT, about)
    return about


def _write_part(folder: Path, name: str, encoder: Encoder) -> dict[str, Any]:
    if isinstance(encoder, TrainedPart):
        encoder = encoder.network
    if not isinstance(encoder, FrozenRetriever | RegionNetwork) or encoder.bits is not None:
        raise ValueError(
            "only descriptors of a backbone can be exported (model=frozen, dir, and parts of these); this encoder is "
            f"{'of codes' if getattr(encoder, 'bits', None) else 'of another kind'} ({type(encoder).__name__})"
        )
    backbone = encoder.backbone
    head = encoder.head if isinstance(encoder, FrozenRetriever) else encoder.descriptor
    longest = backbone.fit == "longest"
    apart = longest and isinstance(head.pooling, RMAC)
    network = backbone.network if apart else Description(backbone.network, head).eval()
    files: dict[int, str] = {}
    for size in encoder.sizes:
        if size not in files:
            files[size] = f"{name}.onnx" if longest or len(set(encoder.sizes)) == 1 else f"{name}-{size}.onnx"
            if not (folder / files[size]).exists():
                _write_network(folder / files[size], network, backbone, size)
    return {
        "scales": [{"file": files[size], "size": size} for size in encoder.sizes],
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
        "min_side": backbone.min_side,
        "head": _write_head(folder / f"{name}.safetensors", head) if apart else None,
        "backbone": {"name": backbone.name, **backbone.provenance},
    }


def _write_network(path: Path, network: nn.Module, backbone: Backbone, size: int) -> None:
    min_side = backbone.min_side if backbone.fit == "longest" else None
    try:
        if isinstance(network, Description) and isinstance(model := network.network, OnnxModel):
            path.write_bytes(export_after(model.data, network.head, model(torch.zeros(2, 3, size, size))))
            return
        path.write_bytes(export_network(network, size, min_side))
        if min_side is not None:
            check_shapes(OnnxFile(path, one_shape=False), network, min_side)
    except RuntimeError as error:
        reason = str(error).removesuffix(": set backbone.runtime=torch")
        raise ValueError(f"{path.stem} ({backbone.name}): {reason}") from error


def _write_head(path: Path, head: DescriptorHead) -> dict[str, Any]:
    pooling, last = head.pooling, head.whitening
    assert isinstance(pooling, RMAC)
    about = {"levels": pooling.levels, "overlap": pooling.overlap, "whole": pooling.whole}
    if last is None:
        return {**about, "whiten_regions": head.whiten_regions, "file": None}
    if isinstance(last, Whitening):
        weight, bias = last.projection, -(last.projection @ last.mean)
    else:  # a fully connected layer that learns
        weight, bias = last.weight, last.bias
    path.write_bytes(save({"weight": weight.detach().contiguous(), "bias": bias.detach().contiguous()}))
    return {**about, "whiten_regions": head.whiten_regions, "file": path.name}


def write_samples(folder: Path, batches: Sequence[Tensor], vectors: Tensor) -> dict[str, str]:
    """Writes the first few images with their descriptors to samples.safetensors, and returns the digest of the file.

    Args:
        folder: The folder of the exported files.
        batches: Images uint8 (B, 3, H, W), each batch of one shape.
        vectors: The descriptors that torch gives these images, float32 (N, D).
    """
    images = [image for batch in batches for image in batch][:_SAMPLES]
    tensors = {f"image.{i}": image.contiguous() for i, image in enumerate(images)}
    (folder / SAMPLES).write_bytes(save(tensors | {"vectors": vectors[: len(images)].contiguous()}))
    return digests(folder, [SAMPLES])
