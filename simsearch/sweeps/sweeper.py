"""A Hydra sweeper on Optuna: workers take one trial after another of a study that they share.

`hydra/sweeper=optuna` (conf/hydra/sweeper/optuna.yaml) has its settings. The folders of trials say what became of
them; the study repeats it for Optuna. Thus a kill at any moment loses nothing: the next start tells the study what the
folders know.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from simsearch import configs, launch, program, saved_run, slurm
from simsearch.files import is_alive, read_json, write_json
from simsearch.identity import identity
from simsearch.sweeps.jobs import Launched, Process, Refused, Runner
from simsearch.sweeps.objectives import names_of
from simsearch.sweeps.space import distributions, plan, point
from simsearch.sweeps.trials import MEASURED_ON, check_same_data, decisive, read_trials
from simsearch.text import warn

if TYPE_CHECKING:
    import optuna

NAME = "hydra_plugins.simsearch.OptunaSweeper"  # Hydra takes plugins from this package only
_LOCAL = ("BasicLauncher", "JoblibLauncher")  # processes of this machine, which are ours to start


def register() -> None:
    """Makes `hydra/sweeper=optuna` known to Hydra."""
    Plugins.instance().class_name_to_class[NAME] = OptunaSweeper


class OptunaSweeper(Sweeper):
    """Runs `n_trials` trials that Optuna proposes, `n_jobs` at a time; a worker that is free takes the next.

    Several processes may work on one study. With the basic launcher and one job at a time, trials run in this process;
    with several, in processes of this machine. Other launchers (SLURM) get a job for each trial.

    A trial that was cut off is continued first, under its number in the study. A failed trial is recorded as such, and
    the sweep goes on.

    Args:
        sampler: Plain config of the sampler. Each trial gets a seed of its own from its seed and the trial's number,
            so that a continued study proposes what an uninterrupted one would have.
        direction: What to do with each objective: a word, or a list of several.
        n_trials: Number of trials of the study.
        n_jobs: Number of trials at a time.
        study_name: Name of the study.
        storage: Its address.
        params: The search space.
        pruner: Plain config of the pruner, or None.

    Raises:
        ValueError: If the numbers are below 1, or if trials of several objectives are to be pruned.
    """

    def __init__(
        self,
        sampler: Any,
        direction: Any,
        n_trials: int,
        n_jobs: int,
        study_name: str,
        storage: str,
        params: Any,
        pruner: Any = None,
    ) -> None:
        for name, number in (("n_trials", n_trials), ("n_jobs", n_jobs)):
            if number < 1:
                raise ValueError(f"hydra.sweeper.{name}={number}: give 1 or more")
        self.sampler, self.pruner = _plain(sampler), _plain(pruner)
        self.directions: list[Any] = [direction] if isinstance(direction, str) else list(_plain(direction))
        self.n_trials, self.n_jobs = n_trials, n_jobs
        self.study_name, self.storage, self.params = study_name, storage, _plain(params)
        self._mutex = threading.RLock()
        self._stopping = False
        self._left: list[tuple[optuna.trial.Trial, str | None]] = []  # with the process that had it
        self._error: BaseException | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what jobs need. Called by Hydra.

        Args:
            hydra_context: Hydra's context.
            task_function: The function that jobs call.
            config: The composed config.
        """
        self.job: dict[str, Any] = {"hydra_context": hydra_context, "task_function": task_function, "config": config}
        self.folder = Path(config.hydra.sweep.dir)

    def sweep(self, arguments: list[str]) -> None:
        """Runs the trials that the study still lacks.

        Args:
            arguments: Overrides of the command line.

        Raises:
            ValueError: If the study does not fit the sweep.
        """
        import optuna

        from simsearch.sweeps.journal import open_storage

        if launch.is_slurm_rank():
            raise ValueError(
                "a study is run by one process, and srun started several: use --ntasks=1 and trainer.devices=<number>, "
                "or hydra/launcher=slurm from a process of its own"
            )
        config, context = self.job["config"], self.job["hydra_context"]
        self.space, self.shared = distributions(self.params, arguments, context.config_loader)
        self.objective = names_of(_plain(config.objective))
        OmegaConf.save(config, self.folder / "multirun.yaml")
        with self._lock_of(_own_process()):  # others see that this process works on its trials
            with self._alone():
                self.study = optuna.create_study(
                    study_name=self.study_name,
                    storage=open_storage(self.storage),
                    directions=self.directions,
                    pruner=configs.build(self.pruner) if self.pruner else optuna.pruners.NopPruner(),
                    load_if_exists=True,
                )
                if (known := [one.name.lower() for one in self.study.directions]) != self.directions:
                    raise ValueError(
                        f"the study {self.study_name} in {self.storage} is to {known}, not {self.directions}"
                    )
                stored = read_trials(self.folder)
                self._check_data(stored)
                self._check_purpose()
                self._check_space()
                self._catch_up(stored)
            self._work(config.hydra.launcher["_target_"].rpartition(".")[2] in _LOCAL)
        self._report()

    # What the study is told

    def _check_purpose(self) -> None:
        """Raises ValueError if the study's trials were for another objective, or had other fixed overrides."""
        own = {"objective": self.objective, "overrides": sorted(decisive(plan(None, self.shared)[1]))}
        before = self.study.user_attrs.get("purpose")
        if before is None:  # a new study, or one of an older version
            self.study.set_user_attr("purpose", own)
        elif before != own:
            said = [" ".join([*one["objective"], *one["overrides"]]) for one in (before, own)]
            raise ValueError(
                f"the study {self.study_name} in {self.storage} is of {said[0]}, not of {said[1]}: give another "
                "hydra.sweep.dir or hydra.sweeper.study_name, or the overrides from before"
            )

    def _check_space(self) -> None:
        """Raises ValueError if a parameter of the study's trials had other choices, or was of another kind."""
        from optuna.distributions import check_distribution_compatibility

        for trial in self.study.get_trials(deepcopy=False):
            for name in trial.distributions.keys() & self.space.keys():
                before, now = trial.distributions[name], self.space[name]
                try:
                    check_distribution_compatibility(before, now)
                except ValueError:
                    raise ValueError(
                        f"the study {self.study_name} in {self.storage} draws {name} from {before}, which a study "
                        f"cannot change into {now}: give another hydra.sweeper.study_name, which takes over what "
                        "this folder has, or the values from before"
                    ) from None

    def _catch_up(self, stored: Sequence[Mapping[str, Any]]) -> None:
        """Tells the study what the trials' folders know, and finds the trials to continue.

        Args:
            stored: The content of the folders.
        """
        import optuna

        states = optuna.trial.TrialState
        folders: dict[int, Mapping[str, Any]] = {}
        stored = [one for one in stored if self._is_ours(one)]
        for one in stored:
            folders |= dict.fromkeys(self._numbers(one), one)
        trials = self.study.get_trials(deepcopy=False)
        for known in trials:
            if known.state is not states.RUNNING:
                continue
            about: Mapping[str, Any] = folders.get(known.number, {})
            same = about.get("objective", self.objective) == self.objective
            if not same or known.params != point(self.space, about.get("overrides", ())):  # of a study that is no more
                about = {}
            trial = optuna.trial.Trial(self.study, known._trial_id)
            if about.get("state") in ("finished", "pruned", "failed"):
                self._tell(trial, about)
            elif not self._is_elsewhere(known, about):
                self._left.append((trial, known.user_attrs.get("process")))
        for one in stored:  # of a study that is no more, or of a grid
            numbers = [number for number in self._numbers(one) if number < len(trials)]
            if one["state"] in ("finished", "pruned") and not numbers:
                self._add(one)

    def _numbers(self, about: Mapping[str, Any]) -> Sequence[int]:
        """A stored trial's numbers in this study."""
        return about.get("numbers", ()) if about.get("study", self.study_name) == self.study_name else ()

    def _stored(self, trial: optuna.trial.Trial) -> Mapping[str, Any]:
        """What a folder knows about a trial, or nothing."""
        for about in read_trials(self.folder):
            known = trial.number in self._numbers(about) and self._is_ours(about)
            if known and point(self.space, about["overrides"]) == trial.params:
                return about
        return {}

    def _is_ours(self, about: Mapping[str, Any]) -> bool:
        """Whether a stored trial has the fixed overrides of this sweep."""
        return _same([text for text in about["overrides"] if text.partition("=")[0] not in self.space], self.shared)

    def _check_data(self, trials: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError if a finished trial was measured on other data than there are now.

        Trials of equal data are checked together, with a config composed from this command line.
        """
        checked = set()
        for about in trials:
            folder, params = self.folder / about["folder"], point(self.space, about["overrides"])
            if about["state"] != "finished" or params is None or not self._is_ours(about):
                continue
            if not (folder / "metrics.json").is_file():
                continue
            stored = saved_run.read_run(folder).config
            parts = identity({name: stored.get(name) for name in MEASURED_ON})
            if parts not in checked:
                checked.add(parts)
                loader, master = self.job["hydra_context"].config_loader, self.job["config"]
                config = loader.load_sweep_config(master, self._overrides(params))
                HydraConfig.instance().set_config(config)
                check_same_data(folder, OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))

    def _overrides(self, params: Mapping[str, Any]) -> list[str]:
        return [*(f"{name}={value}" for name, value in params.items()), *self.shared]

    def _is_elsewhere(self, known: optuna.trial.FrozenTrial, about: Mapping[str, Any]) -> bool:
        """Whether another process works on a trial."""
        here = socket.gethostname()
        process = known.user_attrs.get("process", "")
        if process != _own_process() and self._is_at_work(process):
            return True
        if process.startswith(f"{here}:") and about.get("host", here) == here:
            return False
        if not about:
            return False  # if it is about to begin all the same, its folder is locked
        return _is_held(FileLock(self.folder / about["folder"] / ".lock"))

    def _is_at_work(self, process: str) -> bool:
        """Whether a process of the sweep still runs. Its number alone may be that of another one by now."""
        host, _, pid = process.partition(":")
        lock = self._lock_of(process)
        if not Path(lock.lock_file).exists() or (host == socket.gethostname() and not is_alive(int(pid))):
            return False  # loader processes may hold on to the lock of a dead one
        return _is_held(lock)

    def _lock_of(self, process: str) -> FileLock:
        return FileLock(self.folder / f".{process.replace(':', '-')}.lock")

    @staticmethod
    def _is_taken(trial: optuna.trial.Trial, before: str | None) -> bool:
        """Whether another process than `before` has taken a trial that was left over."""
        return trial.storage.get_trial(trial._trial_id).user_attrs.get("process") != before

    def _add(self, about: Mapping[str, Any]) -> None:
        """Adds a trial to the study that it does not know."""
        import optuna

        params, pruned = point(self.space, about["overrides"]), about.get("pruned")
        values = about["values"] if isinstance(about["values"], list) else [about["values"]]
        values = [pruned["value"]] if pruned else values
        if params is None or len(values) != len(self.directions) or None in values:
            return
        if about.get("objective", self.objective) != self.objective:
            return

        def numbers() -> list[int]:
            trials = self.study.get_trials(deepcopy=False)
            return [trial.number for trial in trials if trial.state.is_finished() and trial.params == params]

        if not numbers():  # else a kill came between the study and the folder
            self.study.add_trial(
                optuna.trial.create_trial(
                    params=params,
                    distributions=dict(self.space),
                    values=values,
                    state=optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.COMPLETE,
                    intermediate_values={pruned["validation"]: pruned["value"]} if pruned else None,
                )
            )
        stored = {name: value for name, value in about.items() if name != "folder"}
        own = {"numbers": numbers(), "study": self.study_name}
        write_json(self.folder / about["folder"] / "trial.json", stored | own)

    def _tell(self, trial: optuna.trial.Trial, about: Mapping[str, Any]) -> None:
        """Tells the study how a trial ended, by its trial.json."""
        import optuna

        states = optuna.trial.TrialState
        with self._mutex:
            if _is_over(trial):  # another process had it too, and was first
                return
            tell = partial(self.study.tell, trial, skip_if_finished=True)
            values = about["values"] if isinstance(about["values"], list) else [about["values"]]
            if about["state"] == "pruned":
                if trial.storage.get_trial(trial._trial_id).last_step is None:  # a point that came twice
                    trial.report(about["pruned"]["value"], about["pruned"]["validation"])
                tell(state=states.PRUNED)
            elif about["state"] == "finished" and None not in values:
                tell(values)
            else:
                trial.set_user_attr("error", about.get("error") or "it returned no value")
                # TPE leaves trials in the state FAIL out, and would propose most others where all have failed.
                tell(state=states.FAIL if about["state"] == "refused" else states.PRUNED)

    # What workers do

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process of the sweep asks for a trial meanwhile."""
        with self._mutex, FileLock(self.folder / ".study.lock"):
            yield

    def _ask(self) -> tuple[optuna.trial.Trial, list[str]] | None:
        """The next trial with its overrides. None if there is none."""
        import optuna

        with self._alone():
            if self._stopping:
                return None
            self._left = [one for one in self._left if not _is_over(one[0]) and not self._is_taken(*one)]
            number = self._left[0][0].number if self._left else len(self.study.get_trials(deepcopy=False))
            if number >= self.n_trials and not self._left:
                return None
            self.study.sampler = configs.build(_with_seed(self.sampler, number))
            trial = optuna.trial.Trial(self.study, self._left.pop(0)[0]._trial_id) if self._left else self.study.ask()
            trial.set_user_attr("process", _own_process())
            values = {name: trial._suggest(name, distribution) for name, distribution in self.space.items()}
        return trial, self._overrides(values)

    def _work(self, local: bool) -> None:
        """Runs trials with all workers until none is left.

        Args:
            local: True for processes of this machine.
        """
        if local and self.n_jobs == 1:
            launcher: Any = BasicLauncher()
            launcher.setup(**self.job)
            self._take(Launched(launcher))
        else:
            if local:
                setting = {"singletons": Singleton.get_state(), "job": self.job}
                runners: list[Runner] = [Process(setting, self.n_jobs) for _ in range(self.n_jobs)]
            else:
                launcher = Plugins.instance().instantiate_launcher(**self.job)
                runners = [Launched(launcher) for _ in range(self.n_jobs)]
            workers = [threading.Thread(target=self._guarded, args=(one,), daemon=True) for one in runners]
            try:
                with self._stopped_in_order(runners) if local else nullcontext():
                    for worker in workers:
                        worker.start()
                    for worker in workers:
                        worker.join()
            except KeyboardInterrupt:  # Ctrl-C, which the processes have got too
                self._stopping = True
                if local:
                    print("waiting for trials to save; press Ctrl-C again to end at once", file=sys.stderr)
                    try:
                        for worker in workers:
                            worker.join()
                    finally:
                        for runner in runners:
                            runner.kill()
                raise SystemExit(130) from None
            if self._error is not None:
                raise self._error

    @contextmanager
    def _stopped_in_order(self, runners: Sequence[Runner]) -> Iterator[None]:
        """Inside the block, SIGTERM and SLURM's warning let trials save; after it the process ends."""

        def stop(number: int) -> None:
            self._stopping = True
            for runner in runners:
                runner.stop(number)

        def terminate(number: int, _: Any) -> None:
            terminated.append(number)
            stop(number)

        terminated: list[int] = []
        here = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, terminate) if here else None
        try:
            with slurm.requeued_if_warned(launch.rank(), partial(stop, signal.SIGUSR1)):
                yield
        finally:
            if here:
                signal.signal(signal.SIGTERM, before)
        if terminated:
            raise SystemExit(128 + signal.SIGTERM)

    def _guarded(self, runner: Runner) -> None:
        try:
            self._take(runner)
        except BaseException as error:
            self._stopping, self._error = True, self._error or error
        finally:
            runner.close()

    def _take(self, runner: Runner) -> None:
        """Runs one trial after another."""
        while asked := self._ask():
            trial, overrides = asked
            try:
                job = runner.run(overrides, trial.number)
            except Refused:
                raise
            except Exception as error:  # the config cannot be composed: so it is with all trials, or nearly
                self._tell(trial, {"state": "refused", "values": None, "error": program.reason(error)})
                raise
            path = None if job.folder is None else job.folder / "trial.json"
            if path is None:  # its worker died, perhaps after the trial's end
                about = self._stored(trial)
            else:
                about = read_json(path) if path.is_file() else {}
            if job.error and job.folder is not None:  # and its folder does not know, so that nobody else will say it
                warn(f"failed: {' '.join(overrides)}: {job.error}")
                self._tell(trial, {"state": "failed", "values": None, "error": job.error})
            elif about.get("state") in ("finished", "pruned", "failed"):
                self._tell(trial, about)
            else:  # it stays a running one in the study, and is continued by the next start
                warn(f"cut off: trial {trial.number} ({' '.join(overrides)}){f': {job.error}' if job.error else ''}")

    def _report(self) -> None:
        """Writes the best parameters, or the Pareto front, to optimization_results.yaml."""
        import optuna

        ended = [optuna.trial.TrialState.COMPLETE]
        if not self.study.get_trials(deepcopy=False, states=ended):
            return
        best = self.study.best_trials
        if len(self.directions) == 1:
            results: dict[str, Any] = {"best_params": best[0].params, "best_value": best[0].value}
        else:
            results = {"solutions": [{"params": one.params, "values": one.values} for one in best]}
        OmegaConf.save(OmegaConf.create({"name": "optuna", **results}), self.folder / "optimization_results.yaml")


def _same(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether overrides are equal, apart from their order, how values are quoted, and what affects no numbers."""
    return sorted(decisive(plan(None, one)[1])) == sorted(decisive(plan(None, other)[1]))


def _is_held(lock: FileLock) -> bool:
    """Whether another process holds a lock."""
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


def _own_process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _is_over(trial: optuna.trial.Trial) -> bool:
    return trial.storage.get_trial(trial._trial_id).state.is_finished()


def _with_seed(sampler: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The sampler with a seed of its own for each trial, so that nothing depends on where a sweep was cut off."""
    seed = sampler.get("seed")
    if seed is None:
        return dict(sampler)
    return {**sampler, "seed": int(np.random.SeedSequence([seed, number]).generate_state(1)[0])}


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
