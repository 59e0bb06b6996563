"""simsearch instance: measures a run's encoder on a benchmark with easy, hard and junk items."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from simsearch import configs, program, saved_run, terminal
from simsearch.data.revisited import (
    Benchmark,
    file_name,
    fingerprint,
    landmarks,
    load_gallery,
    load_queries,
    read_benchmark,
)
from simsearch.files import digests, replacing, write_json
from simsearch.functional.revisited import GRADES, SETUPS, measure_revisited
from simsearch.functional.significance import mean_interval
from simsearch.images import header_shape, read_file
from simsearch.models.encoder import device
from simsearch.search.describe import as_floats, describe
from simsearch.text import cell
from simsearch.types import Encoder

_SAMPLE, _CROPPED = (
    16,
    0.02,
)  # number of images checked, and the share that may be cropped without a warning


@program.command("instance")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch instance`.

    Args:
        config: The config of conf/instance.yaml.
    """
    values = configs.plain(config)
    ks = values["ks"]
    run = saved_run.open_run(Path(config.run), trusted=configs.trusts(config))
    run = replace(run, config=seen_otherwise(run.config, values["size"], values["fit"], values["scales"]))
    benchmark = read_benchmark(Path(config.gnd))
    root = Path(config.images)
    mark = fingerprint(benchmark, root)  # finds missing files before hours of work
    model = saved_run.load_model(run).to(device(config.device))
    encoder = model.encoder
    size, fit = encoder.input_size, encoder.fit
    if fit == "square":
        warn_of_crops(root, benchmark.images[:_SAMPLE])
    batch_size, workers = config.batch_size, config.workers
    queries = load_queries(benchmark, root, size=size, fit=fit, batch_size=batch_size, workers=workers)
    query = describe_all(encoder, queries, len(benchmark.queries), "queries")
    images = load_gallery(benchmark, root, size=size, fit=fit, batch_size=batch_size, workers=workers)
    gallery = describe_all(encoder, images, len(benchmark.images), "gallery")
    per_query = measure_revisited(query, gallery, *map(benchmark.listed, GRADES), ks=ks)
    provenance: Any = model.provenance
    about = {
        "protocol": benchmark.name,
        "fingerprint": mark,
        "model": {"identity": encoder.identity(), **provenance},
        **summary(per_query, landmarks(benchmark)),
    }
    about["metrics"] |= {
        "queries": len(query),
        "gallery": len(gallery),
        "bytes_per_item": 4 * gallery.shape[1] if encoder.bits is None else -(-encoder.bits // 8),
    }
    folder = Path(config.run_dir)
    write_results(folder, benchmark, about, per_query)
    terminal.show(results_table(about, list(ks)))
    print(f"results: {folder / 'metrics.json'}")


def seen_otherwise(
    run: Mapping[str, Any], size: int | None, fit: str | None, scales: list[float] | None
) -> dict[str, Any]:
    """The config of a run whose encoder sees images at another size, fit or scales.

    The run's own config is not modified.

    Args:
        run: The run's plain config.
        size: Side in pixels, or None to keep it.
        fit: How images are fitted to the size, or None to keep it.
        scales: Scales of the images, or None to keep them.

    Raises:
        ValueError: If the network has no such setting.
    """
    config = copy.deepcopy(dict(run))
    network = config["model"].get("network", config["model"])
    for part, name, value in (("backbone", "size", size), ("backbone", "fit", fit), (None, "scales", scales)):
        if value is not None:
            settings = network.get(part, {}) if part else network
            if name not in settings:
                raise ValueError(f"{name}={value}: the network of this run has no setting {name}")
            settings[name] = value
    return config


def warn_of_crops(root: Path, names: Sequence[str]) -> None:
    """Prints on standard error how much of the images a network leaves out that sees their centre squares, if anything.

    Args:
        root: Folder of the images.
        names: Names of the images.
    """
    shapes = [shape for name in names if (shape := header_shape(read_file(root / file_name(name))))]
    lost = [1 - min(shape) / max(shape) for shape in shapes]
    if max(lost, default=0) > _CROPPED:
        print(
            f"fit=square crops away {sum(lost) / len(lost):.0%} of the images (mean of the first {len(lost)}): "
            "fit=longest uses them whole",
            file=sys.stderr,
        )


def describe_all(encoder: Encoder, batches: Iterator[tuple[Tensor, Tensor]], total: int, what: str) -> Tensor:
    """The descriptors float32 (total, D) of all batches in the order of their positions, with a progress bar.

    Args:
        encoder: The encoder.
        batches: Pairs of positions and images.
        total: Number of images.
        what: Text of the progress bar.
    """
    with tqdm(total=total, unit="img", desc=what) as bar:
        found = describe(encoder, ((images, rows, []) for images, rows in batches), advance=bar.update)
    return as_floats(found.vectors, encoder.bits)


def summary(per_query: Mapping[str, Tensor], units: Tensor) -> dict[str, Any]:
    """`metrics`, the means over queries with a value (None if there are none), and `intervals`, their 95% intervals.

    Args:
        per_query: Values of each metric, (Q,).
        units: int64 (Q,), the landmark of each query. It is the sampling unit of the intervals.
    """
    bounds = mean_interval(torch.stack(list(per_query.values()), dim=1), units).tolist()
    metrics: dict[str, float | None] = {}
    intervals = {}
    for (name, values), (low, high) in zip(per_query.items(), bounds, strict=True):
        setup, _, metric = name.partition("/")
        mean = f"{setup}/m{metric}"
        value = float(values.nanmean())
        metrics[mean] = None if math.isnan(value) else value
        if not math.isnan(value):
            intervals[mean] = (low, high)
    for setup in SETUPS:
        metrics[f"{setup}/queries_without_relevant"] = int(per_query[f"{setup}/AP"].isnan().sum())
    return {"unit": "landmark", "units": len(units.unique()), "metrics": metrics, "intervals": intervals}


def write_results(
    folder: Path, benchmark: Benchmark, about: Mapping[str, Any], per_query: Mapping[str, Tensor]
) -> None:
    """Writes metrics.json and per_query.parquet, each atomically.

    Args:
        folder: Folder to write to.
        benchmark: The benchmark.
        about: The content of metrics.json.
        per_query: Values of each metric, (Q,).
    """
    columns: dict[str, Any] = {
        "query": range(len(benchmark.queries)),
        "image": [query.image for query in benchmark.queries],
    }
    columns["unit"] = landmarks(benchmark).numpy()
    columns |= {name: values.numpy() for name, values in per_query.items()}
    meta = {key: about[key] for key in ("protocol", "fingerprint", "unit")} | {"model": json.dumps(about["model"])}
    with replacing(folder / "per_query.parquet") as temporary:
        pq.write_table(pa.table(columns).replace_schema_metadata(meta), temporary)
    about = {**about, "sha256": digests(folder, ["per_query.parquet"])}
    write_json(folder / "metrics.json", {"test": about})


def results_table(about: Mapping[str, Any], ks: list[int]) -> Table:
    """A table with the setups as rows: means, 95% intervals and number of queries.

    Args:
        about: The content of metrics.json.
        ks: The ranks k of the metrics at k.
    """
    metrics, intervals = about["metrics"], about["intervals"]
    over = f"95% intervals by {about['unit']}: {about['units']}"
    table = Table(title=f"{cell(about['protocol'])} {about['fingerprint']} ({over})")
    table.add_column("setup", no_wrap=True)
    names = ["mAP", *(f"mP@{k}" for k in ks)]
    for name in (*names, "queries"):
        table.add_column(name, justify="right")
    for setup in SETUPS:
        cells = [setup.capitalize()]
        for name in names:
            key = f"{setup}/{name}"
            if metrics[key] is None:
                cells.append("-")
            else:
                low, high = intervals[key]
                cells.append(f"{metrics[key]:.4f}\n[dim]{low:.4f}-{high:.4f}[/dim]")
        table.add_row(*cells, str(metrics["queries"] - metrics[f"{setup}/queries_without_relevant"]))
    if about["model"].get("weights") == "random":
        table.caption = "random weights: these numbers say nothing about a trained network"
    return table


if __name__ == "__main__":
    main()
