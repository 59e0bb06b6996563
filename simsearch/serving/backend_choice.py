"""Chooses the runtime of a catalog's networks: ONNX Runtime if it is faster than torch and gives the same results."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from simsearch.models.backbones import Backbone, Runtime
from simsearch.models.exported import ExportedEncoder
from simsearch.models.onnx_model import OnnxModel
from simsearch.types import Encoder

AGREE = 1e-3  # L2 distance of descriptors of norm 1; of codes relative to theirs
_SECONDS = 0.5  # of repetitions of one batch
_TOGETHER = 8  # largest batch that is timed: the server should start within seconds


@dataclass(frozen=True)
class Choice:
    """The runtime of an encoder's networks.

    Attributes:
        runtime: torch or onnx.
        reason: Why it was chosen, in words that are shown when the server starts.
    """

    runtime: Runtime
    reason: str


def choose_runtime(encoder: Encoder, batch_size: int, wanted: Runtime = "auto") -> Choice:
    """Sets all backbones of an encoder to the faster runtime, for single images and for batches.

    Networks that ONNX Runtime cannot run stay on torch. All networks stay on torch on an accelerator, and if the
    descriptors differ.

    Args:
        encoder: The encoder. Its backbones are modified.
        batch_size: Number of images in a batch.
        wanted: auto, torch or onnx.

    Raises:
        ValueError: If `wanted` is "onnx" and a network must stay on torch, "torch" and the encoder is exported, or none
            of the three.
    """
    if wanted not in ("auto", "torch", "onnx"):
        raise ValueError(f"runtime must be auto, torch or onnx, got {wanted!r}")
    if isinstance(encoder, ExportedEncoder):
        if wanted == "torch":
            raise ValueError(
                f"runtime=torch: the files in {encoder.folder} run in ONNX Runtime alone; use runtime=auto"
            )
        return Choice("onnx", f"the files in {encoder.folder}")
    networks = [module for module in encoder.modules() if isinstance(module, Backbone)]
    if networks and all(isinstance(network.network, OnnxModel) for network in networks):
        return Choice("onnx", "its network is an ONNX file")
    networks = [network for network in networks if not isinstance(network.network, OnnxModel)]
    _set(networks, "torch")
    if wanted == "torch":
        return Choice("torch", "runtime=torch")
    on_cpu = all(network.mean.device.type == "cpu" for network in networks)
    if not networks or not on_cpu:
        return _on_torch(networks, wanted, "it is not on the CPU" if networks else "it has no backbone")
    images = _images(encoder, min(batch_size, _TOGETHER))
    batches = [images[:1], images] if len(images) > 1 else [images]
    embed = encoder.embed
    with torch.inference_mode():
        expected = embed(images)
        able, refused = [], []
        for network in networks:
            network.runtime = "onnx"
            try:
                network(images[:1])
                able.append(network)
            except Exception as error:  # ONNX Runtime has many kinds
                network.runtime = "torch"
                refused.append(f"{network.name} cannot run in ONNX Runtime: {error}")
        if not able or (refused and wanted == "onnx"):
            return _on_torch(networks, wanted, "; ".join(refused))
        try:
            found = embed(images)
        except Exception as error:  # at another scale
            return _on_torch(networks, wanted, f"it cannot run in ONNX Runtime: {error}")
        if not (apart := float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())) <= AGREE:
            return _on_torch(networks, wanted, f"its descriptors differ in ONNX Runtime by {apart:.2g}")
        times: dict[Runtime, list[float]] = {"torch": [], "onnx": []}
        for runtime, taken in times.items():
            _set(able, runtime)
            taken += [seconds(partial(embed, batch)) for batch in batches]
    ratio = torch.tensor(times["torch"]) / torch.tensor(times["onnx"])
    chosen: Runtime = wanted if wanted != "auto" else "onnx" if ratio.prod() > 1 else "torch"
    _set(able, chosen)
    said = [
        f"{len(batch)} image{'s' * (len(batch) > 1)}: {1e3 * a:.0f} ms on torch, {1e3 * b:.0f} ms in ONNX Runtime"
        for batch, a, b in zip(batches, times["torch"], times["onnx"], strict=True)
    ]
    return Choice(chosen, "; ".join(said + refused))


def seconds(run: Callable[[], object], budget: float = _SECONDS) -> float:
    """The median duration in seconds of up to 20 calls. If there are several calls, the first is left out.

    Args:
        run: The function to time.
        budget: Approximate total time in seconds.
    """
    taken: list[float] = []
    while not taken or (sum(taken) < budget and len(taken) < 20):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    rest = sorted(taken[1:] or taken)
    return rest[len(rest) // 2]


def _on_torch(networks: list[Backbone], wanted: Runtime, why: str) -> Choice:
    _set(networks, "torch")
    if wanted == "onnx":
        raise ValueError(f"runtime=onnx does not fit this encoder: {why}. Use runtime=auto")
    return Choice("torch", why)


def _set(networks: list[Backbone], runtime: Runtime) -> None:
    for network in networks:
        network.runtime = runtime


def _images(encoder: Encoder, count: int) -> Tensor:
    """Smooth noise, similar to pictures, uint8 (count, 3, H, W), with the sides of a typical image."""
    size = encoder.input_size
    height = size if encoder.fit == "square" else max(1, 3 * size // 4)
    small = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    return nn.functional.interpolate(small, (height, size), mode="bilinear").to(torch.uint8)
