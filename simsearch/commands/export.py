"""simsearch export: exports a catalog's encoder as ONNX files, and checks that they find the same neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor

from simsearch import __version__, configs, program, terminal
from simsearch.commands.index import report_errors
from simsearch.data.manifest import Manifest, read_manifest
from simsearch.files import is_temporary, replacing_folder, restore, write_json
from simsearch.functional.ragged import ragged, stacks
from simsearch.functional.resize import resize_to_fit
from simsearch.images import decode_thumbnail
from simsearch.models.backbones import Backbone
from simsearch.models.export import write_exported, write_samples
from simsearch.models.exported import ABOUT, ExportedEncoder
from simsearch.search.calibration_sample import chosen
from simsearch.search.catalog import Catalog, read_catalog
from simsearch.search.describe import batches_of, encode
from simsearch.search.writing import check_apart
from simsearch.serving.backend_choice import seconds
from simsearch.types import Encoder, SearchResult

BATCHES = (1, 8)


@dataclass(frozen=True)
class Agreement:
    """How well the exported files agree with torch.

    Attributes:
        images: Number of images compared.
        k: Number of neighbours compared per image.
        descriptor: Largest L2 distance between two descriptors of one image. It bounds the difference in scores.
        same_set: Share of images with the same neighbours, in [0, 1].
        same_order: Share of images with the same neighbours in the same order, in [0, 1].
        border: Among items that only one of the two found, the largest gap between an item's score and the k-th score.
    """

    images: int
    k: int
    descriptor: float
    same_set: float
    same_order: float
    border: float


@program.command("export")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch export`.

    Args:
        config: The config of conf/export.yaml.

    Raises:
        ValueError: If a value is invalid, or if `out` lies in the catalog or around it.
    """
    for name, least in (("k", 1), ("sample", 1), ("batch_size", 1), ("tolerance", 0)):
        if not config[name] >= least:
            raise ValueError(f"{name} must be at least {least}, got {config[name]}")
    out = Path(config.out)
    check_apart(out, Path(config.catalog))
    catalog = read_catalog(Path(config.catalog), trusted=configs.trusts(config))
    encoder = catalog.encoder
    for module in encoder.modules():
        if isinstance(module, Backbone):
            module.runtime = "torch"  # what is compared
    with whole_folder(out) as temporary:
        about = write_exported(temporary, encoder)
        exported = ExportedEncoder(temporary)
        batches = list(sample_images(config, catalog, encoder))
        expected = torch.cat([encode(encoder, images) for images in batches])
        about["sha256"] |= write_samples(temporary, batches, expected)
        agreement = compare(catalog, expected, exported, batches, config.k)
        check(agreement, config.tolerance)
        speeds = {n: [speed(describe, batches[0][:1], n) for describe in (encoder.embed, exported.embed)]
                  for n in BATCHES}  # fmt: skip
        checked = {**asdict(agreement), "tolerance": config.tolerance, "threads": torch.get_num_threads()}
        checked |= {
            "images_per_second": {str(n): dict(zip(("torch", "onnx"), s, strict=True)) for n, s in speeds.items()}
        }
        fingerprint = catalog.about["encoder_fingerprint"]
        write_json(temporary / ABOUT, {**about, "encoder": fingerprint, "simsearch": __version__, "checked": checked})
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    terminal.show(results(agreement, speeds))
    print(f"{out}: " + ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in sizes.items()))


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields a folder to write to. If the block succeeds, it replaces `out`; otherwise `out` stays as it was.

    Args:
        out: The output folder.

    Raises:
        FileExistsError: If `out` holds anything but an earlier export.
    """
    out = out.resolve()
    restore(out)
    if out.exists():
        names = {path.name for path in out.iterdir() if not is_temporary(path.name)} if out.is_dir() else {out.name}
        foreign = sorted(n for n in names if n != ABOUT and not n.endswith((".onnx", ".safetensors")))
        if not out.is_dir() or foreign or (names and ABOUT not in names):
            raise FileExistsError(f"{out} exists and holds other files than an export: give another out=")
    with replacing_folder(out) as temporary:
        yield temporary


def sample_images(config: DictConfig, catalog: Catalog, encoder: Encoder) -> Iterator[Tensor]:
    """Batches uint8 (B, 3, H, W), each of one shape, of some given images, else of the catalog's thumbnails.

    Args:
        config: The command's config.
        catalog: The catalog.
        encoder: Its encoder.

    Raises:
        ValueError: If no image can be read.
    """
    size, fit = encoder.input_size, encoder.fit
    if not config.images:
        positions = chosen(len(catalog), config.sample, config.seed).tolist()
        pictures = [resize_to_fit(decode_thumbnail(data), size, fit) for data in catalog.thumbnails(positions)]
        yield from (stack for _, stack in stacks(ragged(pictures), config.batch_size))
        return
    manifest = read_manifest(Path(config.images))
    rows = chosen(len(manifest), config.sample, config.seed).tolist()
    manifest = Manifest(manifest.root, tuple(manifest.paths[row] for row in rows))
    errors, count = [], 0
    for images, _, unreadable in batches_of(encoder, manifest, batch_size=config.batch_size):
        errors += unreadable
        count += len(images)
        if len(images):
            yield images
    report_errors(errors, {})
    if not count:
        raise ValueError(f"no image of {config.images} could be read")


def compare(catalog: Catalog, expected: Tensor, exported: ExportedEncoder, batches: list[Tensor], k: int) -> Agreement:
    """How well the files agree with torch, on descriptors and on the neighbours of the images.

    Args:
        catalog: The catalog.
        expected: The descriptors of the images by torch, float32 (N, D).
        exported: The exported files.
        batches: Batches of images (B, 3, H, W).
        k: Number of neighbours.
    """
    k = min(k, len(catalog))
    found = torch.cat([exported.embed(images) for images in batches])
    one, other = catalog.index.search(expected, k), catalog.index.search(found, k)
    ids = list(zip(one.ids, other.ids, strict=True))
    same_set = [torch.equal(a.sort().values, b.sort().values) for a, b in ids]
    return Agreement(
        images=len(found),
        k=k,
        descriptor=float((found - expected).norm(dim=1).max()),
        same_set=sum(same_set) / len(found),
        same_order=sum(torch.equal(a, b) for a, b in ids) / len(found),
        border=max(border(one, other), border(other, one)),
    )


def border(one: SearchResult, other: SearchResult) -> float:
    """Among items only `one` found: the largest gap between an item's score and the k-th score.

    0 if both found the same.

    Args:
        one: A search result.
        other: Another search result for the same queries.
    """
    missing = (one.ids[:, :, None] != other.ids[:, None, :]).all(2) & (one.ids >= 0)
    apart = (one.scores - one.scores[:, -1:]).abs()
    return float(apart[missing].max()) if missing.any() else 0.0


def check(agreement: Agreement, tolerance: float) -> None:
    """Checks that the files agree with torch.

    Args:
        agreement: The agreement.
        tolerance: Largest accepted difference.

    Raises:
        ValueError: If they do not agree within the tolerance.
    """
    if not agreement.descriptor <= tolerance:  # nan too
        raise ValueError(
            f"the exported files give other descriptors than torch; they differ by up to {agreement.descriptor:.3g}, "
            f"more than tolerance={tolerance:g}. Nothing was written"
        )
    # Both scores, that of the item and that at the border, may move by a descriptor's difference.
    if not agreement.border <= 2 * tolerance:
        raise ValueError(
            f"the exported files find other items than torch for {1 - agreement.same_set:.1%} of the images, with "
            f"scores up to {agreement.border:.3g} above the last, more than twice tolerance={tolerance:g}. "
            "Nothing was written"
        )


def speed(describe: Callable[[Tensor], Tensor], image: Tensor, batch: int) -> float:
    """The number of images per second.

    Args:
        describe: The function to time.
        image: (1, 3, H, W), one image.
        batch: Number of images per batch.
    """
    images = image.expand(batch, -1, -1, -1).contiguous()
    with torch.inference_mode():
        return batch / seconds(lambda: describe(images), 2.0)


def results(agreement: Agreement, speeds: dict[int, list[float]]) -> Table:
    """A table of what was checked, and of the speed of both.

    Args:
        agreement: The agreement.
        speeds: Images per second by batch size, of torch and of the files.
    """
    table = Table(title=f"The exported files against torch, on {agreement.images} images", show_header=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("largest difference of descriptors (L2)", f"{agreement.descriptor:.2g}")
    table.add_row(f"same {agreement.k} neighbours", f"{agreement.same_set:.1%}")
    table.add_row("in the same order", f"{agreement.same_order:.1%}")
    if agreement.border:
        table.add_row("largest score above the last of an item that only one found", f"{agreement.border:.2g}")
    for batch, (torch_speed, onnx_speed) in speeds.items():
        said = f"{torch_speed:.1f} torch, {onnx_speed:.1f} ONNX Runtime ({onnx_speed / torch_speed:.2f} x)"
        table.add_row(f"images/s, {batch} at a time, {torch.get_num_threads()} threads", said)
    return table


if __name__ == "__main__":
    main()
