"""One rank of a training: `python -m simsearch.worker RUN_DIR [REPORTS] [trust=true]`, started by launch.run_ranks.

Everything it needs is in the run directory; Hydra is not involved. torchrun can start it too, for example on several
nodes without SLURM: `torchrun --nnodes=2 --nproc-per-node=4 ... -m simsearch.worker RUN_DIR`.
"""

from __future__ import annotations

import logging
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl

from simsearch import launch, program, saved_run
from simsearch.commands.train import train_run


def main() -> None:
    """Trains, and reports an error to the parent."""
    places = [argument for argument in sys.argv[1:] if argument != launch.TRUST]
    folder, reports = Path(places[0]), Path(places[1]) if len(places) > 1 else None
    trusted = launch.TRUST in sys.argv
    if reports is not None:
        launch.end_with_parent()
    program.quiet_libraries()
    if launch.rank() == 0:
        handler = logging.FileHandler(folder / "train.log", delay=True)
        handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
        logging.getLogger("simsearch").addHandler(handler)
        logging.getLogger("simsearch").setLevel(logging.INFO)
    with launch.as_found():
        try:
            # A new run has no checkpoint to go on from.
            run = replace(saved_run.open_run(folder, trusted=trusted), resumed=True)
            pl.seed_everything(run.config["seed"], workers=True, verbose=False)
            train_run(run)
        except Exception as error:
            if reports is None:
                raise
            expected = isinstance(error, program.user_errors())
            message = program.reason(error) if expected else f"{type(error).__name__}: {error}"
            launch.report_error(reports, message, "" if expected else traceback.format_exc())
            raise SystemExit(1) from None


if __name__ == "__main__":
    main()
