"""simsearch data audit: finds near-duplicates of the queries in the gallery or the training set."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig

from simsearch import configs, program, saved_run
from simsearch.data.audit import audit, contact_sheet, write_duplicates
from simsearch.files import write_json

_GOOD = 0.9


@program.command("data_audit")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch data audit`.

    Args:
        config: The config of conf/data_audit.yaml.
    """
    run = saved_run.open_run(Path(config.run), trusted=configs.trusts(config))
    model = saved_run.load_model(run)
    configs.see_as(config, run.config, model.encoder)
    values = configs.plain(config)
    merged = run.config | {group: values[group] for group in ("data", "protocol") if values.get(group)}
    data = configs.build_data(merged)
    collection, split = data.collection, data.split
    descriptors = None
    if model.bits is None:
        trainer = configs.build_trainer({**merged, "callbacks": {}}, run.folder, [])
        descriptors = torch.cat(trainer.predict(model, data))
    else:
        print("the run gives codes: near-duplicates are found by perceptual hash only")
    labels = collection.column(split.test.attribute)
    found, precision = audit(
        collection.images,
        descriptors,
        split.test,
        split.train,
        labels,
        min_correlation=config.min_correlation,
        neighbours=config.neighbours,
        max_distance=config.max_distance,
        progress=True,
    )
    out = Path(config.out) if config.out else run.folder / "audit"
    write_duplicates(out / "duplicates.csv", found, collection)
    contact_sheet(collection.images, found, out / "duplicates.png")
    leaks = {part: len(found.queries(part)) for part in ("gallery", "train")}
    about = {
        "protocol": split.test.name,
        "fingerprint": split.test.fingerprint,
        "queries": len(split.test.query),
        "queries_with_duplicates": leaks,
        "pairs": len(found),
        "precision": None if math.isnan(precision) else precision,
        **{name: values[name] for name in ("min_correlation", "neighbours", "max_distance")},
    }
    write_json(out / "audit.json", about)
    count = len(split.test.query)
    for part, n in leaks.items():
        print(f"{split.test.name}: {n} of {count} queries ({n / count:.2%}) have a near-duplicate in {part}")
    print(f"{len(found)} pairs: {out / 'duplicates.csv'}, and a sample to look at: {out / 'duplicates.png'}")
    if math.isnan(precision):
        print(f"the labels ({split.test.attribute}) do not show how many pairs are right: look at the sample")
    else:
        print(f"estimated precision {precision:.1%}, from pairs with different labels ({split.test.attribute})")
        if precision < _GOOD:
            print("this precision is low: give a larger min_correlation", file=sys.stderr)
    told = configs.overrides_of("data", "protocol")
    command = ["simsearch", "evaluate", f"run={run.folder}", *told, f"without={out / 'duplicates.csv'}"]
    print(f"measure without them: {shlex.join(command)}")


if __name__ == "__main__":
    main()
