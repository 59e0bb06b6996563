"""simsearch evaluate: a run's checkpoint measured again, by its own or another protocol or index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from simsearch import runtime
from simsearch.data.audit import read_csv
from simsearch.data.protocols import WithoutRows


@runtime.command("evaluate")
def main(config: DictConfig) -> None:
    if config.stage not in ("test", "validate"):
        raise ValueError(f"stage must be test or validate, got {config.stage!r}")
    run = runtime.open_run(Path(config.run))
    values = runtime.plain(config)
    merged = run.config | {group: values[group] for group in ("data", "protocol", "index") if values.get(group)}
    evaluation = merged["callbacks"]["evaluation"] | {"index": merged["index"]}
    merged["callbacks"] = {"evaluation": evaluation}
    model = runtime.load_model(run)
    folder = Path(config.run_dir)

    measure(model, runtime.build_data(merged), merged, folder, config.stage)
    if config.without:
        rows = read_csv(Path(config.without)).query.unique()
        protocol = WithoutRows(runtime.build(merged["protocol"]), rows)
        data = runtime.build_data(merged, protocol)
        measure(model, data, merged, folder / "without", config.stage)


def measure(
    model: pl.LightningModule, data: pl.LightningDataModule, config: dict[str, Any], folder: Path, stage: str
) -> None:
    """Measures one stage, leaves metrics.json (and per_query.parquet) in `folder`, prints the table."""
    trainer = runtime.build_trainer(config, folder, [])
    run_stage = trainer.test if stage == "test" else trainer.validate
    run_stage(model, data, verbose=False)
    runtime.show(runtime.results_table(json.loads((folder / "metrics.json").read_text())))
    print(f"results: {folder / 'metrics.json'}")


if __name__ == "__main__":
    main()
