"""Commands that are killed at any change of a file, and typed again: the result is whole, and nothing else is left."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import simsearch

SAMPLE = ["data.styles=2", "data.artists=2", "data.works=2", "data.photographs=2", "data.size=32", "backbone.size=32"]
RUN = [*SAMPLE, "model.whitening.dimension=8", "callbacks.evaluation.ks=[1]", "logger.mode=disabled"]
TRAINED = [
    *SAMPLE,
    "model=hashing",
    "model.network.bits=8",
    "backbone.weights=random",
    "callbacks.evaluation.ks=[1]",
    "logger.mode=disabled",
    "trainer.max_epochs=2",
    "trainer.check_val_every_n_epoch=1",
]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


def is_change(event: str, values: tuple, below: str) -> bool:
    """Whether an audit event makes, opens for writing, moves or deletes a file below a folder."""
    if event == "open":
        path, mode, flags = values
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return bool(writes or set(str(mode)) & set("wax+")) and str(path).startswith(below)
    return event in CHANGES and any(str(value).startswith(below) for value in values[:2])


def run(arguments: list[str], below: Path, at: int = 0) -> tuple[int, int]:
    """Exit status of a command in a process of its own, and how many changes it made below a folder.

    at: it sends itself SIGKILL instead of making its so-manieth change.
    """
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)

    def target() -> None:
        own = os.getpid()

        def strike(event: str, values: tuple) -> None:
            if os.getpid() == own and is_change(event, values, str(below)):
                count.value += 1
                if count.value == at:
                    os.kill(own, signal.SIGKILL)

        sys.addaudithook(strike)
        sys.argv = ["simsearch", *arguments]
        log = (below.parent / "log.txt").open("a", buffering=1)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log  # pytest's capture put others in their place
        from simsearch.__main__ import main

        main()

    process = context.Process(target=target)
    process.start()
    process.join(300)
    assert process.exitcode is not None, f"{' '.join(arguments)} hangs"
    return process.exitcode, count.value


def names(folder: Path) -> set[str]:
    """All that lies below a folder, also what is hidden; not the metrics of the parts of a run that was resumed."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in found if not re.search(r"metrics-\d+\.csv$", name)}


def killed_anywhere(
    arguments: list[str], prepare: Callable[[Path], None], kills: int, folder: Path, resume: bool = False
) -> None:
    """Kills a command at `kills` of its changes, at all where there are fewer.

    Typed again (or resumed) it leaves what an undisturbed one leaves. prepare: lays what the command needs into an
    empty folder, in which the command works. arguments: with {} for it.
    """

    def fresh(name: str) -> tuple[Path, list[str]]:
        (folder / name).mkdir()
        work = folder / name / "work"
        work.mkdir()
        prepare(work)
        return work, [part.replace("{}", str(work)) for part in arguments]

    work, typed = fresh("whole")
    code, changes = run(typed, work)
    assert code == 0, (work.parent / "log.txt").read_text()
    want = names(work)
    kills, struck = min(kills, changes), 0
    for at in sorted(random.Random(0).sample(range(1, changes + 1), kills)):
        work, typed = fresh(f"killed-{at}")
        code, _ = run(typed, work, at)
        struck += code == -signal.SIGKILL
        code, _ = run(typed, work)
        if code != 0 and resume:
            assert "resume=true" in (work.parent / "log.txt").read_text()
            code, _ = run([*typed, "resume=true"], work)
        said = (work.parent / "log.txt").read_text()
        assert code == 0, f"killed at change {at} of {changes}, it does not go on:\n{said[-2000:]}"
        assert names(work) == want, f"killed at change {at} of {changes}, it leaves other files:\n{said[-2000:]}"
        shutil.rmtree(work.parent)
    assert struck >= kills - 1, "it changes files in another number each time"
    print(f"{' '.join(arguments)}: {struck} kills at {changes} changes")


@pytest.fixture(scope="module")
def made(tmp_path_factory, _own_folders) -> Path:
    """A run, images, a catalog of them, images from outside, shards."""
    folder = tmp_path_factory.mktemp("made")
    simsearch("train", *RUN, f"run_dir={folder}/run")
    simsearch("data", "export", "data=rendered", *[o for o in SAMPLE if o.startswith("data.")], f"out={folder}/images")
    simsearch("index", f"run={folder}/run", f"images={folder}/images", f"out={folder}/catalog", "device=cpu")
    return folder


COMMANDS = {
    "train": (["train", *RUN, "run_dir={}/out"], (), True),
    "train, all layers": (["train", *TRAINED, "run_dir={}/out"], (), True),
    "sweep": (["train", "-m", *RUN, "seed=0,1", "hydra.sweep.dir={}/out"], (), False),
    "evaluate": (["evaluate", "run={}/run", "run_dir={}/out"], ("run",), False),
    "index": (["index", "run={}/run", "images={}/images", "out={}/out", "device=cpu"], ("run", "images"), False),
    "index again": (  # made anew as a whole
        ["index", "run={}/run", "images={}/images", "out={}/catalog", "index=sq8", "device=cpu"],
        ("run", "images", "catalog"),
        False,
    ),
    "index, changed": (  # other attributes
        ["index", "run={}/run", "images={}/images/manifest.csv", "out={}/catalog", "device=cpu"],
        ("run", "images", "catalog"),
        False,
    ),
    "catalog add": (
        ["catalog", "add", "catalog={}/catalog", "images={}/images", "root={}", "device=cpu"],
        ("images", "catalog"),
        False,
    ),
    "catalog export": (["catalog", "export", "catalog={}/catalog", "out={}/out", "rows=1"], ("catalog",), False),
    "extract": (
        ["extract", "run={}/run", "images={}/images", "out={}/out", "chunk=4", "workers=0", "device=cpu"],
        ("run", "images"),
        False,
    ),
    "calibrate": (["calibrate", "catalog={}/catalog", "device=cpu"], ("catalog",), False),
    "data ingest": (
        ["data", "ingest", "images={}/images", "out={}/out", "size=32", "workers=1", "near.descriptors=false"],
        ("images",),
        False,
    ),
    "data export": (
        ["data", "export", "data=rendered", *[o for o in SAMPLE if o.startswith("data.")], "out={}/out"],
        (),
        False,
    ),
    "recommend": (
        ["recommend", "catalog={}/catalog", "id=position:0", "k=3", "figure={}/figure.png", "device=cpu"],
        ("catalog",),
        False,
    ),
    "compare": (["compare", "runs=[{}/run]", "out={}/out"], ("run",), False),
    "export": (["export", "catalog={}/catalog", "out={}/out"], ("catalog",), False),
}


@pytest.mark.parametrize(
    ("name", "kills"),
    [("train", 2), ("index again", 2), *(pytest.param(name, 40, marks=pytest.mark.slow) for name in COMMANDS)],
)
def test_killed_and_typed_again(name, kills, made, tmp_path):
    arguments, needs, resume = COMMANDS[name]

    def prepare(work: Path) -> None:
        for need in needs:
            shutil.copytree(made / need, work / need)

    killed_anywhere(arguments, prepare, kills, tmp_path, resume)
