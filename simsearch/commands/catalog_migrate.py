"""simsearch catalog migrate: brings a catalog of an earlier version to the present format."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from simsearch import configs, program
from simsearch.search.change import migrate


@program.command("catalog_migrate")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch catalog migrate`.

    Args:
        config: The config of conf/catalog_migrate.yaml.
    """
    was_old = migrate(Path(config.catalog), trusted=configs.trusts(config))
    said = "now has the present format" if was_old else "has the present format already"
    print(f"the catalog {config.catalog} {said}")


if __name__ == "__main__":
    main()
