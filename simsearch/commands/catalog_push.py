"""simsearch catalog push: brings PostgreSQL or Milvus to a catalog's present version, to search there."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from simsearch import configs, program
from simsearch.search.catalog import read_catalog
from simsearch.search.stores.push import push
from simsearch.text import say


@program.command("catalog_push")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch catalog push`.

    Args:
        config: The config of conf/catalog_push.yaml.

    Raises:
        ValueError: If no store is given.
    """
    store = configs.build(config.store) if config.get("store") else None
    if store is None:
        raise ValueError("give the engine to push to: store=pgvector or store=milvus, with store.uri=")
    catalog = read_catalog(Path(config.catalog), calibrated=False, trusted=configs.trusts(config))
    pushed = push(catalog, store)
    say(f"{store.place}: version {catalog.about.get('version', 1)} of {config.catalog}: {pushed}")
    store.close()


if __name__ == "__main__":
    main()
