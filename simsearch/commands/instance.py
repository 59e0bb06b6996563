"""simsearch instance: measures a run's encoder on a benchmark with easy, hard and junk items."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from simsearch import configs, program, saved_run, terminal
from simsearch.data.revisited import file_name, load_gallery, load_queries, read_benchmark
from simsearch.evaluation.record import write_record
from simsearch.evaluation.revisited import Revisited, benchmark_sides, benchmark_task, columns, stage
from simsearch.files import check_writable
from simsearch.functional.revisited import SETUPS
from simsearch.images import header_shape, read_file
from simsearch.models.encoder import device, seen_otherwise
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
    run = saved_run.open_run(Path(config.run), trusted=configs.trusts(config))
    run = replace(run, config=seen_otherwise(run.config, values["size"], values["fit"], values["scales"]))
    benchmark = read_benchmark(Path(config.gnd))
    evaluator = Revisited(benchmark, values["ks"], values["depth"])
    root = Path(config.images)
    task = benchmark_task(benchmark, root)  # finds missing files before hours of work
    check_writable(folder := Path(config.run_dir), "run_dir")
    model = saved_run.load_model(run).to(device(config.device))
    encoder = model.encoder
    size, fit = encoder.input_size, encoder.fit
    if fit == "square":
        warn_of_crops(root, benchmark.images[:_SAMPLE])
    batch_size, workers = config.batch_size, config.workers
    images = load_queries(benchmark, root, size=size, fit=fit, batch_size=batch_size, workers=workers)
    query = describe_all(encoder, images, len(benchmark.queries), "queries")
    images = load_gallery(benchmark, root, size=size, fit=fit, batch_size=batch_size, workers=workers)
    gallery = describe_all(encoder, images, len(benchmark.images), "gallery")

    measured = evaluator(*benchmark_sides(query, gallery, task), task)
    provenance: Any = model.provenance
    about = stage(task, measured, {"identity": encoder.identity(), **provenance})
    about["metrics"] |= {
        "queries": len(query),
        "gallery": len(gallery),
        "bytes_per_item": 4 * gallery.shape[1] if encoder.bits is None else -(-encoder.bits // 8),
    }
    write_record(folder, {"test": about}, columns(benchmark, measured))
    terminal.show(results_table(about, ["mAP", *(f"mP@{k}" for k in values["ks"])]))
    if values["depth"]:
        terminal.show(results_table(about, ["GAP", "GAP-", "microAP", f"mAP@{values['depth']}_minRk"]))
    print(f"results: {folder / 'metrics.json'}")


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


def results_table(about: Mapping[str, Any], names: Sequence[str]) -> Table:
    """A table with the setups as rows: values, 95% intervals and the number of queries that have something right.

    Args:
        about: The content of metrics.json.
        names: The metrics to show, without the setup.
    """
    metrics, intervals = about["metrics"], about["intervals"]
    over = f"95% intervals by {about['unit']}: {about['units']}"
    table = Table(title=f"{cell(about['protocol'])} {about['fingerprint']} ({over})")
    table.add_column("setup", no_wrap=True)
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
