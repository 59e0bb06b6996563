"""simsearch catalog compact: merges the segments of a catalog into one."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from simsearch import configs, program
from simsearch.search.change import compact


@program.command("catalog_compact")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch catalog compact`.

    Args:
        config: The config of conf/catalog_compact.yaml.
    """
    print(f"{compact(Path(config.catalog), trusted=configs.trusts(config))}, in one segment")


if __name__ == "__main__":
    main()
