"""simsearch catalog info: shows what a catalog holds, and whether its calibration still stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from simsearch import configs, program, terminal
from simsearch.files import json_line
from simsearch.search.catalog import Catalog, read_catalog
from simsearch.search.drift import standing
from simsearch.text import cell


@program.command("catalog_info")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch catalog info`.

    Args:
        config: The config of conf/catalog_info.yaml.

    Raises:
        ValueError: If `format` is unknown.
    """
    if config.format not in ("table", "json"):
        raise ValueError(f"format must be table or json, got {config.format!r}")
    about = facts(read_catalog(Path(config.catalog), trusted=configs.trusts(config)))
    if config.format == "json":
        print(json_line(about))
        return
    table = Table(title=f"catalog {cell(config.catalog)}", title_justify="left", show_header=False)
    for name, value in about.items():
        table.add_row(name, cell(value if isinstance(value, str) else json_line(value)))
    terminal.show(table)


def facts(catalog: Catalog) -> dict[str, Any]:
    """What a catalog holds, as plain values.

    Args:
        catalog: The catalog.
    """
    folders = [segment.folder for segment in catalog.segments]
    files = {path for folder in {catalog.folder, *folders} for path in folder.rglob("*") if path.is_file()}
    of_calibration = standing(catalog)
    return {
        "format": catalog.about["format"],
        "version": catalog.about.get("version", 1),
        "items": len(catalog),
        "next_id": catalog.names.given,
        "ids": "the column id" if catalog.names.own else "numbers of the catalog",
        "segments": [len(segment) for segment in catalog.segments],
        "removed_rows": sum(map(len, catalog.segments)) - len(catalog),
        "columns": catalog.items.column_names,
        "index": catalog.index.factory,
        "encoder": catalog.about["encoder_fingerprint"],
        "bytes": sum(path.stat().st_size for path in files),
        "calibration": "none" if of_calibration is None else str(of_calibration),
    }


if __name__ == "__main__":
    main()
