"""simsearch data export: writes images of a collection as PNG files with a manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from simsearch import configs, program
from simsearch.files import replacing, write_csv


@program.command("data_export")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch data export`.

    Args:
        config: The config of conf/data_export.yaml.

    Raises:
        ValueError: If the collection has no such part.
    """
    parts = ("all", "train", "query", "gallery")
    if config.part not in parts:
        raise ValueError(f"part must be one of {', '.join(parts)}, got {config.part!r}")
    data = configs.build_data(configs.plain(config))
    collection, split = data.collection, data.split
    rows = {
        "all": np.arange(len(collection)),
        "train": split.train.numpy(),
        "query": split.test.query.numpy(),
        "gallery": split.test.gallery.numpy(),
    }[config.part]
    if config.limit is not None:
        rows = np.sort(np.random.default_rng(config.seed).permutation(rows)[: config.limit])
    out = Path(config.out)
    names = [f"{row:06d}.png" for row in rows]
    for row, name in zip(tqdm(rows, desc="export", unit="img"), names, strict=True):
        with replacing(out / "images" / name) as temporary:
            Image.fromarray(collection.images[row].permute(1, 2, 0).numpy()).save(temporary, "PNG")
    columns = [[f"images/{name}" for name in names]]
    for classes, attribute in zip(collection.classes, collection.attributes, strict=True):
        labels = collection.column(attribute)[rows].tolist()
        columns.append([classes[label] if label >= 0 else "" for label in labels])
    write_csv(out / "manifest.csv", ["path", *collection.attributes], zip(*columns, strict=True), exact=True)
    print(f"{len(rows)} images of {collection.name} in {out}, listed in {out / 'manifest.csv'}")


if __name__ == "__main__":
    main()
