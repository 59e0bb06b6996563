"""simsearch extract: describes many images with any number of processes, as shards to build an index from."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from simsearch import configs, launch, program, saved_run
from simsearch.commands.index import report_errors
from simsearch.data.manifest import Manifest, read_manifest
from simsearch.models.encoder import encoder_config
from simsearch.search.extract import POLL_SECONDS, Work, describe_chunks, images_done, run_ranks
from simsearch.search.shards import Shards, begin, open_shards
from simsearch.text import warn


@program.command("extract")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch extract`.

    Args:
        config: The config of conf/extract.yaml.
    """
    rank, ranks, local = place(config.rank, config.ranks)
    run = saved_run.open_run(Path(config.run), trusted=configs.trusts(config))
    source, out = Path(config.images).resolve(), Path(config.out).resolve()
    manifest = read_manifest(source, Path(config.root) if config.root else None)
    for note in manifest.notes:
        warn(f"note: {source.name}: {note}")
    encoder = saved_run.load_model(run).encoder
    given = {"run": run.folder.resolve(), "images": source, "root": config.root and Path(config.root).resolve()}
    given |= {"out": out, "chunk": config.chunk, "thumbnail": config.thumbnail}
    given |= {"trust": "true"} if config.trust else {}
    shards = begin(
        out,
        manifest,
        encoder=encoder,
        config=encoder_config(run.config),
        chunk=config.chunk,
        thumbnail=config.thumbnail,
        trusted=run.trusted,
        source={"run": run.folder.name, "images": str(manifest.root)},
        command=shlex.join(["simsearch", "extract", *(f"{key}={value}" for key, value in given.items() if value)]),
    )
    settings = config.batch_size, config.workers, config.device, run.trusted
    work = Work(out, manifest.root, rank or 0, ranks, local, *settings, manifest.max_pixels)
    with stopping(shards):
        if rank is None:
            with progress(shards, shown=True) as show:
                run_ranks(shards, work, rank_main, show)
        else:
            with progress(shards, shown=rank == 0) as show:
                describe_chunks(shards, encoder, manifest, work, show)
    shards.clear()
    if not rank:
        report(shards)


def place(rank: int | None, ranks: int | None) -> tuple[int | None, int, int]:
    """This process's rank, the number of ranks, and the process's number on its machine.

    A rank of None means that this process must start `ranks` processes.

    Args:
        rank: The given rank, or None.
        ranks: The given number of ranks, or None.

    Raises:
        ValueError: If rank and ranks do not fit together.
    """
    if rank is not None:
        if ranks is None or not 0 <= rank < ranks:
            raise ValueError(
                f"rank={rank} needs ranks=, the number of all ranks, and it must be larger: got ranks={ranks}"
            )
        return rank, ranks, rank
    if ranks is not None:
        if ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {ranks}")
        return (None, ranks, 0) if ranks > 1 else (0, 1, 0)
    return launch.place()


def rank_main(work: Work) -> None:
    """The main function of a process of `run_ranks`. It does not use Hydra; the encoder comes from the plan.

    Args:
        work: The task of the rank.
    """
    program.quiet_libraries()
    torch.set_num_threads(max(1, torch.get_num_threads() // work.ranks))
    try:
        shards = open_shards(work.shards, trusted=work.trusted)
        with stopping(shards, quiet=True):
            manifest = Manifest(work.root, tuple(shards.items["path"].to_pylist()), max_pixels=work.max_pixels)
            describe_chunks(shards, shards.encoder, manifest, work, show=lambda: None)
    except (ValueError, OSError) as error:
        if os.environ.get("SIMSEARCH_DEBUG") == "1":
            raise
        warn(f"simsearch extract: rank {work.rank}: {error}")
        raise SystemExit(1) from None


@contextmanager
def stopping(shards: Shards, quiet: bool = False) -> Iterator[None]:
    """Inside the block, SIGTERM and SIGINT drop the current chunk, release its claim and end the process.

    Args:
        shards: The shards.
        quiet: Print nothing.
    """

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough: what follows is clearing up
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except SystemExit:
        if not quiet:
            done = len(shards) - len(shards.missing())
            print(
                f"stopped: {done} of {len(shards)} shards are finished; give the same command again to continue",
                file=sys.stderr,
            )
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress(shards: Shards, shown: bool) -> Iterator[Callable[[], None]]:
    """Yields a function that updates a progress bar over the work of all ranks.

    Args:
        shards: The shards.
        shown: Show the bar.
    """
    last = 0.0

    def show() -> None:
        nonlocal last
        if shown and time.monotonic() - last > POLL_SECONDS:
            bar.update(images_done(shards) - bar.n)
            last = time.monotonic()

    start = images_done(shards) if shown else 0
    with tqdm(total=len(shards.items), initial=start, unit="img", desc="extract", disable=not shown) as bar:
        yield show
        if shown:
            bar.update(images_done(shards) - bar.n)


def report(shards: Shards) -> None:
    """Prints what was described and what was not, and what to do next.

    Args:
        shards: The shards.
    """
    errors = [error for number in range(len(shards)) for error in shards.errors(number)]
    print(f"{len(shards.items) - len(errors)} images in {len(shards)} shards in {shards.folder}")
    report_errors(errors, shards.about["skipped"])
    print(f"try next: simsearch index {shlex.quote(f'shards={shards.folder}')} out=<catalog>")


if __name__ == "__main__":
    main()
