"""simsearch catalog export: writes ids, vectors and attributes of a catalog's items for other programs."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from simsearch import configs, program
from simsearch.search.catalog import read_catalog
from simsearch.search.parquet import export_parquet, facts


@program.command("catalog_export")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch catalog export`.

    Args:
        config: The config of conf/catalog_export.yaml.

    Raises:
        ValueError: If `to` is unknown, or as `export_parquet` does.
    """
    if config.to != "parquet":
        raise ValueError(f"to must be parquet, got {config.to!r}")
    catalog = read_catalog(Path(config.catalog), calibrated=False, trusted=configs.trusts(config))
    files = export_parquet(catalog, Path(config.out), rows=config.rows)
    size = sum(path.stat().st_size for path in files)
    decoded = f"; the vectors are decoded from {catalog.index.factory}" if facts(catalog)["decoded"] else ""
    number = "1 file" if len(files) == 1 else f"{len(files)} files"
    print(f"{config.out}: {len(catalog)} items in {number} ({size / 1e6:.1f} MB){decoded}")


if __name__ == "__main__":
    main()
