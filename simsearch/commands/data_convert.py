"""simsearch data convert: converts the ground truth of Revisited Oxford / Paris (gnd_*.pkl) to JSON."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from simsearch import program
from simsearch.data.revisited import convert_ground_truth, write_benchmark
from simsearch.functional.revisited import GRADES


@program.command("data_convert")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch data convert`.

    Args:
        config: The config of conf/data_convert.yaml.

    Raises:
        ValueError: If the source would be overwritten.
    """
    source = Path(config.gnd)
    name = config.name or source.stem.removeprefix("gnd_")
    out = Path(config.out) if config.out else source.with_suffix(".json")
    if out == source:
        raise ValueError(f"{source} would be overwritten: give another out=")
    benchmark = convert_ground_truth(source, name)
    write_benchmark(out, benchmark)
    counts = ", ".join(f"{sum(map(len, benchmark.listed(grade)))} {grade}" for grade in GRADES)
    print(f"{name}: {len(benchmark.queries)} queries, {len(benchmark.images)} images, {counts}, in {out}")
    print(f"try next: simsearch instance run=<run> gnd={out} images=<folder of the images>")


if __name__ == "__main__":
    main()
