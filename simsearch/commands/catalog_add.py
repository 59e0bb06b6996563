"""simsearch catalog add: adds images to a catalog, and describes changed ones again."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from simsearch import configs, program
from simsearch.commands.index import report_change
from simsearch.models.encoder import device
from simsearch.search.change import manifest_to_add, update
from simsearch.text import warn


@program.command("catalog_add")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch catalog add`.

    Args:
        config: The config of conf/catalog_add.yaml.
    """
    folder, source = Path(config.catalog), Path(config.images).expanduser().resolve()
    root = Path(config.root).expanduser().resolve() if config.root else None
    manifest = manifest_to_add(folder, source, root, trusted=configs.trusts(config))
    for note in manifest.notes:
        warn(f"note: {source.name}: {note}")
    change = update(
        folder,
        manifest,
        remove=False,
        batch_size=config.batch_size,
        workers=config.workers,
        device=device(config.device),
        trusted=configs.trusts(config),
    )
    report_change(folder, change, manifest.skipped, trusted=configs.trusts(config))


if __name__ == "__main__":
    main()
