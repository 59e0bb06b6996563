"""simsearch catalog remove: removes items from a catalog."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from simsearch import configs, program
from simsearch.commands.index import report_change
from simsearch.search.change import remove


@program.command("catalog_remove")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch catalog remove`.

    Args:
        config: The config of conf/catalog_remove.yaml.
    """
    folder, trusted = Path(config.catalog), configs.trusts(config)
    change = remove(folder, configs.listed(configs.plain(config)["id"]), trusted=trusted)
    report_change(folder, change, {}, trusted=trusted)


if __name__ == "__main__":
    main()
