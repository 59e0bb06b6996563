"""What Hydra calls at the start and the end of a sweep and of its jobs."""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from simsearch import program, terminal
from simsearch.files import read_json, write_json
from simsearch.sweeps import objectives, trials
from simsearch.sweeps.progress import planned_trials, progress_table, read_sweep, summary
from simsearch.sweeps.space import plan
from simsearch.text import warn


class Sweep(Callback):
    """A Hydra callback for sweeps. It continues interrupted sweeps and reports their state and failures.

    Each trial finds out by itself whether it is finished.
    """

    def __init__(self) -> None:
        self._since = time.time()

    def on_run_start(self, config: DictConfig, config_name: str | None = None) -> None:  # type: ignore[override]
        """Checks that the folder of a single run can be written to.

        Args:
            config: The composed config.
            config_name: Name of the config.
        """
        HydraConfig.instance().set_config(config)
        try:  # Hydra would end in a traceback where it cannot make the folder
            folder = Path(config.hydra.run.dir)
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"the folder {folder} is not writable")
        except program.user_errors() as error:
            warn(f"simsearch train: {program.reason(error)}: give another run_dir")
            raise SystemExit(1) from None

    def on_multirun_start(self, config: DictConfig, config_name: str | None = None) -> None:  # type: ignore[override]
        """Prepares the sweep, or ends the process with an error.

        Args:
            config: The composed config.
            config_name: Name of the config.
        """
        try:
            self._start(config)
        except program.user_errors() as error:  # Hydra would make a warning of it and go on
            warn(f"simsearch train: {program.reason(error)}")
            raise SystemExit(1) from None

    def _start(self, config: DictConfig) -> None:
        folder, sweeper = Path(config.hydra.sweep.dir), config.hydra.sweeper
        names = objectives.names_of(config.objective)
        objectives.check(config)
        if "direction" in sweeper:
            if not names:
                raise ValueError(
                    "this sweeper needs an objective: give objective=val/mAP, or several as "
                    "objective=[val/mAP,val/bytes_per_item]"
                )
            with open_dict(config):
                sweeper.direction = objectives.directions(names, sweeper.direction)
            if sweeper.get("pruner") and not (len(names) == 1 and names[0].startswith("val/")):
                raise ValueError(
                    f"a pruner needs one objective of the validation, such as val/mAP, not {', '.join(names)}: leave "
                    "hydra/sweeper/pruner out, or name one objective"
                )
        loader = GlobalHydra.instance().config_loader()
        swept, shared = plan(sweeper.get("params"), config.hydra.overrides.task, loader)
        about = {"swept": list(swept), "objective": names, "ended": False}
        if "n_trials" in sweeper:
            about |= {"planned": sweeper.n_trials, "study": str(sweeper.study_name)}
            about |= {"direction": [sweeper.direction] if len(names) == 1 else list(sweeper.direction)}
        else:
            about |= {"planned": math.prod(len(values) for values in swept.values()), "grid": swept, "shared": shared}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "sweep.json", about | {"host": socket.gethostname(), "pid": os.getpid()})
        print(f"sweep {folder}: {summary(folder)}; watch it by `simsearch progress folder={folder}`", file=sys.stderr)

    def on_job_end(self, config: DictConfig, job_return: JobReturn) -> None:  # type: ignore[override]
        """Reports the end of a job.

        Args:
            config: The composed config.
            job_return: The result of the job.
        """
        if config.hydra.mode is not RunMode.MULTIRUN:
            return
        print(f"sweep: {summary(Path(config.hydra.sweep.dir), self._since)}", file=sys.stderr)
        result = Path(config.hydra.runtime.output_dir) / "trial.json"
        if job_return.status is JobStatus.FAILED and result.is_file() and read_json(result)["error"]:
            # Left as it is, a grid would report the first failure by its traceback and forget the others.
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    def on_multirun_end(self, config: DictConfig, config_name: str | None = None) -> None:  # type: ignore[override]
        """Reports the state of the sweep at its end. Ends the process with status 1 if a trial failed.

        Args:
            config: The composed config.
            config_name: Name of the config.
        """
        folder = Path(config.hydra.sweep.dir)
        write_json(folder / "sweep.json", {**read_sweep(folder), "ended": True})
        terminal.show(progress_table(folder))
        found = planned_trials(folder)
        others = [t["folder"] for t in found if t["state"] == "finished" and t.get("code") != trials.code_version()]
        if others:
            warn(
                f"{len(others)} trials were computed by another version of the code, such as {others[0]}: delete "
                "them to compute them again"
            )
        failed = [about for about in found if about["state"] == "failed"]
        for about in failed:
            warn(f"failed: {about['folder']}: {about['error']}")
        cut_off = [about for about in found if about["state"] == "interrupted"]
        if cut_off:
            warn(
                f"{len(cut_off)} trials were cut off, such as {cut_off[0]['folder']}: the same command with "
                f"hydra.sweep.dir={folder} continues them"
            )
        if failed or cut_off:
            raise SystemExit(1)
