"""A stand-in for `simsearch train` whose trials cost nothing: python cheap_sweep.py -m hydra/sweeper=optuna ...

A trial's curve rises towards its value, which follows from its swept parameters. It obeys a pruner and continues where
a kill left it.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from simsearch import configs, program
from simsearch.files import read_json, write_json
from simsearch.sweeps import trials
from simsearch.sweeps.sweeper import register

EPOCHS = 9
WAIT, FAILS_BELOW = "CHEAP_WAIT", "CHEAP_FAILS_BELOW"  # seconds of an epoch, the least value that does not fail
FIRST = "CHEAP_FIRST"  # seconds of an epoch of trial 0, if others


def value_of(learning_rate: float, margin: float) -> float:
    """The value of a trial at its end."""
    return round(1 - (learning_rate - 0.3) ** 2 - (margin - 0.6) ** 2, 6)


@program.command("train", resumes=True)
def main(config: DictConfig) -> object:
    with trials.trial(config) as trial:
        assert trial is not None
        if trial.finished:
            return trial.values
        value = value_of(config.cheap.lr, config.cheap.margin)
        if value < float(os.environ.get(FAILS_BELOW, -1)):
            raise ValueError(f"cheap.lr={config.cheap.lr} is too far away")
        about, log = trials.pruned_by(), trial.folder / "epochs.json"
        reporter = None
        if about is not None:
            from simsearch.sweeps.journal import Reporter

            reporter = Reporter(about["storage"], about["study"], about["number"], configs.build(about["pruner"]))
        done = read_json(log)["epochs"] if log.is_file() else 0
        wait = os.environ.get(WAIT, 0)
        if HydraConfig.get().job.num == 0:
            wait = os.environ.get(FIRST, wait)
        for epoch in range(done + 1, EPOCHS + 1):
            time.sleep(float(wait))
            write_json(log, {"epochs": epoch})
            with (trial.folder.parent / "work.log").open("a") as file:
                file.write(json.dumps([trial.folder.name, epoch, os.getpid(), time.time()]) + "\n")
            now = value * (1 - 0.5**epoch)
            if reporter is not None and reporter(now, epoch) and epoch < EPOCHS:
                trial.pruned = {
                    "objective": "val/mAP",
                    "value": now,
                    "validation": epoch,
                    "epoch": epoch,
                    "step": epoch,
                }
                return None
        several = not isinstance(config.objective, str)
        trial.values = [value, float(config.cheap.lr)] if several else value
        return trial.values


def sweep(folder: Path, *overrides: str) -> list[str]:
    """Arguments of a sweep over two parameters."""
    return [
        *("-m", "hydra/sweeper=optuna", f"hydra.sweep.dir={folder}", "logger.mode=disabled"),
        *("+cheap.lr=interval(0.0,1.0)", "+cheap.margin=interval(0.0,1.0)", "hydra.sweeper.sampler.seed=0"),
        *(() if any(text.startswith("objective=") for text in overrides) else ("objective=val/mAP",)),
        *overrides,
    ]


register()
if __name__ == "__main__":
    main()
