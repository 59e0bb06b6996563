"""simsearch data audit: near-duplicates between queries and gallery or training images."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from simsearch import runtime


@runtime.command("data_audit")
def main(config: DictConfig) -> None:
    run = runtime.open_run(Path(config.run))
    values = runtime.plain(config)
    merged = run.config | {group: values[group] for group in ("data", "protocol") if values.get(group)}
    data = runtime.build_data(merged)
    collection, split = data.collection, data.split  # type: ignore[attr-defined]
    print(f"{split.test.name}: {len(split.test.query)} queries, {len(split.test.gallery)} in the gallery")
    raise SystemExit("wired below")
