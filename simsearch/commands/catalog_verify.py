"""simsearch catalog verify: compares each file of a catalog with its digest."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from simsearch import configs, program
from simsearch.search.change import problems


@program.command("catalog_verify")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch catalog verify`.

    Args:
        config: The config of conf/catalog_verify.yaml.

    Raises:
        ValueError: If a file is damaged or missing.
    """
    found = problems(Path(config.catalog), trusted=configs.trusts(config))
    for problem in found:
        print(problem)
    if found:
        raise ValueError(f"the catalog {config.catalog} is damaged in {len(found)} places: make it again")
    print(f"each file of the catalog {config.catalog} is as it was written")


if __name__ == "__main__":
    main()
