"""An encoder of descriptors exported as ONNX files, with a description of all steps around them.

    encoder.json          steps, sizes and files; the fingerprint of the catalog's encoder; what was checked
    <part>.onnx           a network, one for each size of a part
    <part>.safetensors    a head, where the ONNX file ends with maps
    samples.safetensors   a few images and their descriptors by torch, which every machine that uses the files compares

There is no code: ONNX Runtime computes the networks, and `ExportedEncoder` or a program in another language the rest.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from simsearch.files import Damaged, checked, read_json
from simsearch.functional.pooling import rmac
from simsearch.functional.resize import resize_to_fit
from simsearch.models.onnx import OnnxFile, parse
from simsearch.types import Fit, Part

FORMAT = 1
ABOUT = "encoder.json"
SAMPLES = "samples.safetensors"
SAME = 0.9999  # least cosine of the files' descriptor of an image with that by torch


def read_about(folder: Path) -> dict[str, Any]:
    """The content of the encoder.json of an export.

    Args:
        folder: The folder of the exported files.

    Raises:
        ValueError: If the folder holds no export, one of another format, or one that is damaged.
    """
    try:
        about = read_json(folder / ABOUT)
    except OSError as error:
        raise ValueError(
            f"no exported encoder in {folder} ({error}): make one by `simsearch export catalog=... out=...`"
        ) from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{folder / ABOUT} has format {about.get('format')}, this version reads {FORMAT}")
    return about


class ExportedEncoder(nn.Module):
    """An Encoder that runs in ONNX Runtime on the CPU, using only the files that `write_exported` left in a folder.

    It describes queries. It has no tensors of torch, so no catalog can keep it.

    Args:
        folder: The folder.

    Raises:
        ValueError: If the files are of another format or damaged.
    """

    bits = None

    def __init__(self, folder: Path) -> None:
        super().__init__()
        about = read_about(folder)
        self.folder, self._about = folder, about
        try:
            self.input_size = int(about["image"]["size"])
            self.fit: Fit = about["image"]["fit"]
            self.dimension = int(about["dimension"])
            self._steps: dict[str, dict[str, Any]] = about["parts"]
            self.parts = {name: Part(part["start"], part["stop"], part["weight"]) for name, part in self._steps.items()}
            names = {scale["file"] for part in self._steps.values() for scale in part["scales"]}
            heads = {name: part["head"]["file"] for name, part in self._steps.items() if part["head"]}
        except (LookupError, TypeError) as error:
            raise Damaged(f"{folder / ABOUT} is damaged ({error!r}): export the encoder again") from error
        self.provenance = {"weights": "exported", "encoder": str(about.get("encoder", ""))}
        self._files = {name: OnnxFile(self._model(name), self.fit == "square") for name in sorted(names)}
        self._tensors = {name: load_file(self._path(file)) for name, file in heads.items() if file}

    def _path(self, name: str) -> Path:
        """The path of a file of the export, after a comparison with its digest."""
        if Path(name).name != name:
            raise Damaged(f"{self.folder / ABOUT} names the file {name!r}, which is not in the folder")
        return checked(self.folder, name, self._about)

    def _model(self, name: str) -> bytes:
        path = self._path(name)
        data = path.read_bytes()
        parse(data, str(path))  # refuses tensors in other files
        return data

    def check_samples(self) -> None:
        """Checks that the files give the stored images their descriptors by torch, on this machine.

        Raises:
            ValueError: If they do not, or if there are no stored images.
        """
        if SAMPLES not in self._about.get("sha256", {}):
            raise ValueError(
                f"{self.folder} holds no {SAMPLES} to check the files by: export the encoder again by this version"
            )
        samples = load_file(self._path(SAMPLES))
        expected = samples.pop("vectors")
        found = torch.cat([self.embed(samples[f"image.{i}"][None]) for i in range(len(expected))])
        cosines = F.cosine_similarity(found, expected)
        if not (cosines >= SAME).all():  # nan too
            raise ValueError(
                f"the files in {self.folder} give other descriptors here than torch gave when they were written: the "
                f"cosine of one image is {float(cosines.nan_to_num(-1).min()):.6f}, at least {SAME} is asked. Export "
                "the encoder again"
            )

    def identity(self) -> dict[str, object]:
        """The fingerprint of the encoder that the files were exported from, as plain values."""
        return {"family": "exported", "encoder": self.provenance["encoder"]}

    def embed(self, image: Tensor) -> Tensor:
        """L2-normalised descriptors float32 (B, D).

        Args:
            image: uint8 (B, 3, H, W).
        """
        vectors = []
        for name, part in self._steps.items():
            scales = [self._scale(image, name, scale) for scale in part["scales"]]
            vectors.append(math.sqrt(part["weight"]) * F.normalize(torch.stack(scales).sum(0), dim=1))
        return torch.cat(vectors, dim=1)

    def _scale(self, image: Tensor, name: str, scale: dict[str, Any]) -> Tensor:
        part = self._steps[name]
        mean, std = (torch.tensor(part[key])[:, None, None] for key in ("mean", "std"))
        pixels = (resize_to_fit(image, scale["size"], self.fit).float() - mean) / std
        if self.fit == "longest":
            y, x = (max(0, part["min_side"] - side) for side in pixels.shape[2:])
            pixels = F.pad(pixels, (x // 2, x - x // 2, y // 2, y - y // 2), mode="replicate")
        features = self._files[scale["file"]](pixels)
        if (head := part["head"]) is None:
            return features
        regions = F.normalize(rmac(features, head["levels"], whole=head["whole"], overlap=head["overlap"]), dim=2)
        if not head["whiten_regions"]:
            regions = F.normalize(regions.sum(1, keepdim=True), dim=2)
        if name in self._tensors:
            tensors = self._tensors[name]
            regions = F.normalize(regions @ tensors["weight"].T + tensors["bias"], dim=2)
        return F.normalize(regions.sum(1), dim=1)
