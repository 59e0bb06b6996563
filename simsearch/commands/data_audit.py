"""simsearch data audit: near-duplicates of the queries in the gallery or the training set."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig

from simsearch import runtime
from simsearch.data.audit import audit, contact_sheet, write_csv


@runtime.command("data_audit")
def main(config: DictConfig) -> None:
    run = runtime.open_run(Path(config.run))
    values = runtime.plain(config)
    merged = run.config | {group: values[group] for group in ("data", "protocol") if values.get(group)}
    data = runtime.build_data(merged)
    collection, split = data.collection, data.split  # type: ignore[attr-defined]
    model = runtime.load_model(run)
    descriptors = None
    if model.bits is None:
        trainer = runtime.build_trainer({**merged, "callbacks": {}}, run.folder, [])
        descriptors = torch.cat(trainer.predict(model, data))  # type: ignore[arg-type]
    else:
        print("the run gives codes: near-duplicates are sought by perceptual hash alone")
    found = audit(
        collection.images,
        descriptors,
        split.test,
        split.train,
        min_similarity=config.min_similarity,
        max_distance=config.max_distance,
        progress=True,
    )
    out = Path(config.out) if config.out else run.folder / "audit"
    write_csv(out / "duplicates.csv", found, collection)
    contact_sheet(collection.images, found, out / "duplicates.png")
    count = len(split.test.query)
    for part in ("gallery", "train"):
        n = len(found.queries(part))
        print(f"{split.test.name}: {n} of {count} queries ({n / count:.2%}) have a near-duplicate in {part}")
    print(f"{len(found)} pairs: {out / 'duplicates.csv'}, and a sample to look at: {out / 'duplicates.png'}")
    print(f"measure without them: simsearch evaluate run={run.folder} without={out / 'duplicates.csv'}")


if __name__ == "__main__":
    main()
