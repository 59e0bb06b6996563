"""The tensors of an encoder in a catalog or shards, checked against its fingerprint; or its exported files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from simsearch.cache import cache_key
from simsearch.files import checked
from simsearch.models.backbones import state_fingerprint
from simsearch.models.encoder import build_encoder
from simsearch.models.exported import ExportedEncoder, read_about
from simsearch.search.errors import CatalogError
from simsearch.types import Encoder, Part


def encoder_fingerprint(encoder: Encoder) -> str:
    """16 hex digits over the encoder's identity() and its tensors, which together determine the descriptors.

    Args:
        encoder: The encoder.
    """
    return cache_key({"identity": encoder.identity(), "state": state_fingerprint(encoder)})[:16]


def write_encoder(folder: Path, encoder: Encoder) -> dict[str, Any]:
    """Writes the tensors of an encoder to encoder.safetensors and returns its fingerprint and provenance.

    The digest of the file is not included; the caller adds it.

    Args:
        folder: Folder to write to.
        encoder: The encoder.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    (folder / "encoder.safetensors").write_bytes(save(state))  # save_file would keep it from other users
    return {
        "encoder_fingerprint": encoder_fingerprint(encoder),
        "backbone": dict(encoder.provenance),
        **_parts(encoder),
    }


def _parts(encoder: Encoder) -> dict[str, Any]:
    """The entry `parts` for an encoder with several parts, or with codes (the index cannot tell bits from padding)."""
    if (parts := getattr(encoder, "parts", None)) is None and encoder.bits is not None:
        parts = {"content": Part(0, encoder.bits, 1.0)}
    return {} if parts is None else {"parts": {name: asdict(part) for name, part in parts.items()}}


def read_encoder(folder: Path, about: Mapping[str, Any], *, trusted: bool = False) -> Encoder:
    """The encoder that `write_encoder` wrote to `folder`, checked against `about`.

    Args:
        folder: Folder of the encoder's tensors.
        about: The folder's description with config, fingerprint and digests.
        trusted: Allow the config to build any object.

    Raises:
        CatalogError: If the encoder cannot be built, or if its tensors are damaged or belong to another encoder.
        Untrusted: If the config names an object that an encoder may not contain, and `trusted` is False.
    """
    try:
        encoder = build_encoder(about["config"], trusted=trusted)
    except (LookupError, TypeError) as error:
        raise CatalogError(f"{folder} does not record how its encoder is built: {error!r}") from error
    load_tensors(folder, about, encoder)
    return encoder


def read_exported(folder: Path) -> ExportedEncoder:
    """The encoder that `simsearch export` wrote to a folder, after a check that it describes images as torch did.

    Args:
        folder: The folder of the exported files.

    Raises:
        CatalogError: If a file is missing or damaged, or if ONNX Runtime gives other descriptors here.
    """
    try:
        encoder = ExportedEncoder(folder)
        encoder.check_samples()
    except Exception as error:  # onnxruntime has many kinds
        raise CatalogError(f"cannot use the exported encoder in {folder}: {error}") from error
    return encoder


def check_exported(exported: Path, folder: Path, about: Mapping[str, Any]) -> None:
    """Checks that exported files come from the encoder of a catalog.

    Args:
        exported: The folder of the exported files.
        folder: The catalog's folder.
        about: The content of catalog.json.

    Raises:
        CatalogError: If they come from another one, or if they do not say.
    """
    try:
        other = read_about(exported).get("encoder")
    except ValueError as error:
        raise CatalogError(str(error)) from error
    if other != (own := about["encoder_fingerprint"]):
        raise CatalogError(
            f"{exported} was exported from encoder {other}, the catalog {folder} was filled by {own}: their "
            f"descriptors do not compare. Export its own: simsearch export catalog={folder} out=..."
        )


def load_tensors(folder: Path, about: Mapping[str, Any], encoder: Encoder) -> None:
    """Loads the tensors in `folder` into an encoder and checks the result against `about`.

    Args:
        folder: Folder of the encoder's tensors.
        about: The folder's description with fingerprint and digests.
        encoder: The encoder to load into.

    Raises:
        CatalogError: If the tensors are damaged or do not fit, or if the result is a different encoder.
    """
    try:
        encoder.load_state_dict(load_file(checked(folder, "encoder.safetensors", about)))
    except (RuntimeError, SafetensorError, OSError, ValueError) as error:
        raise CatalogError(f"cannot load the encoder of {folder}: {error}") from error
    encoder.provenance = dict(about["backbone"])
    own, other = about["encoder_fingerprint"], encoder_fingerprint(encoder)
    if own != other:
        raise CatalogError(
            f"{folder} was filled by encoder {own}, but this one is {other}: their descriptors cannot be compared. "
            "Search with the catalog's own encoder or make a new catalog"
        )
