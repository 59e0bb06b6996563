"""Describes the chunks of shards with any number of processes, each of which takes what no other works on."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from simsearch.data.loading import ImageBatch, load_chunks
from simsearch.data.manifest import ImageFiles, Manifest
from simsearch.data.presence import Presence
from simsearch.images import MAX_PIXELS, ImageError
from simsearch.models.encoder import device
from simsearch.search.describe import describe
from simsearch.search.leases import Claims, claimed
from simsearch.search.shards import ShardError, Shards
from simsearch.text import warn
from simsearch.types import Encoder

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Work:
    """The task of one rank, in plain values.

    Attributes:
        shards: Folder of the shards.
        root: Folder of the images.
        rank: Number of this rank.
        ranks: Number of ranks.
        local: Number of this process on its machine. It chooses the accelerator.
        batch_size: Number of images per forward pass.
        workers: Number of processes that decode files.
        device: Device of the encoder.
        trusted: True if the user trusts whoever made the run.
        max_pixels: Largest number of pixels of one image.
    """

    shards: Path
    root: Path
    rank: int
    ranks: int
    local: int
    batch_size: int
    workers: int
    device: str
    trusted: bool = False
    max_pixels: int = MAX_PIXELS


def describe_chunks(shards: Shards, encoder: Encoder, manifest: Manifest, work: Work, show: Callable[[], None]) -> None:
    """Describes chunks that no other process works on, until none is missing. This includes chunks of ranks that died.

    Args:
        shards: The shards.
        encoder: The encoder.
        manifest: The images.
        work: The task of this rank.
        show: Updates the progress bar.
    """
    encoder = encoder.to(accelerator(work.device, work.local))
    presence = shards.presence(manifest.root)
    check_own(shards, presence, work.rank, work.ranks)
    files = ImageFiles(manifest, size=encoder.input_size, fit=encoder.fit)
    size = shards.about["chunk"]
    with Claims(shards.folder / "claims") as claims:
        while shards.missing():
            numbers = free_chunks(shards, claims, work.rank * len(shards) // work.ranks)
            chunks = (shards.rows(number) for number in numbers)
            idle = True
            for rows, batches in load_chunks(files, chunks, batch_size=work.batch_size, workers=work.workers):
                idle = False
                number = rows.start // size

                def advance(done: int, number: int = number) -> None:
                    claims.advance(number, done)
                    show()

                describe_chunk(shards, number, encoder, presence, batches, advance)
                claims.release(number)
            if idle:
                abandon_with_parent()
                show()
                time.sleep(POLL_SECONDS)


def free_chunks(shards: Shards, claims: Claims, first: int) -> Iterator[int]:
    """Yields missing chunks, each claimed just before. Starts at `first` and continues with the earlier ones.

    Args:
        shards: The shards.
        claims: The claims of this process.
        first: Number of the first chunk.
    """
    missing = shards.missing()
    for number in [n for n in missing if n >= first] + [n for n in missing if n < first]:
        if not shards.path(number).exists() and claims.take(number):
            if shards.path(number).exists():  # finished between the question and the claim
                claims.release(number)
            else:
                yield number


def describe_chunk(
    shards: Shards,
    number: int,
    encoder: Encoder,
    presence: Presence,
    batches: Iterator[ImageBatch],
    advance: Callable[[int], None],
) -> None:
    """Describes one chunk and writes its shard.

    Args:
        shards: The shards.
        number: Number of the chunk.
        encoder: The encoder.
        presence: The files that existed at the start.
        batches: Batches of the chunk's images.
        advance: Called with the number of images done.

    Raises:
        Vanished: If images of the chunk have disappeared.
    """
    root, done = presence.root, 0

    def while_started() -> Iterator[ImageBatch]:
        for batch in batches:
            abandon_with_parent()
            yield batch

    def count(images: int) -> None:
        nonlocal done
        done += images
        advance(done)

    size = shards.about["thumbnail"]
    found = describe(encoder, while_started(), thumbnail=size, presence=presence, advance=count)
    errors = [ImageError(e.path.relative_to(root), e.reason, e.detail) for e in found.errors]  # type: ignore[attr-defined]
    shards.write(number, found.rows, found.vectors, found.thumbnails, errors)


def check_own(shards: Shards, presence: Presence, rank: int, ranks: int) -> None:
    """Reads this rank's part of the finished shards and deletes those that must be made again.

    These are damaged shards, and shards that call images missing which existed when the shards were begun and exist
    now.

    Args:
        shards: The shards.
        presence: The files that existed at the start.
        rank: Number of this rank.
        ranks: Number of ranks.
    """
    missing, root = set(shards.missing()), Path(shards.about["source"]["images"])
    for number in range(rank, len(shards), ranks):
        if number not in missing:
            try:
                shards.check(number)
                failed = [
                    (str(e.path.relative_to(root)), e.reason) for e in shards.errors(number) if e.path is not None
                ]
                if back := [path for path, reason in failed if presence.is_back(path, reason)]:
                    raise ShardError(
                        f"the shard {shards.path(number)} misses {len(back)} images that are readable now, such as "
                        f"{back[0]}"
                    )
            except ShardError as error:
                warn(f"{error}: doing it again")
                shards.path(number).unlink(missing_ok=True)


def accelerator(name: str, local: int) -> torch.device:
    """The device of the given name. If the machine has several accelerators, the one for process `local`.

    Args:
        name: Name of the device.
        local: Number of this process on its machine.
    """
    found = device(name)
    if found.type == "cuda" and found.index is None and torch.cuda.device_count() > 1:
        return torch.device("cuda", local % torch.cuda.device_count())
    return found


def abandon_with_parent() -> None:
    """Ends a process of `run_ranks` once its parent is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)


# ------------------------------------------------------------------------------ ranks of this machine


def run_ranks(shards: Shards, work: Work, main: Callable[[Work], None], show: Callable[[], None]) -> None:
    """Starts `work.ranks` processes and waits for them.

    Args:
        shards: The shards.
        work: The task, which all ranks share but for their numbers.
        main: What each process runs, by which its task is described. It has to be found by its import path.
        show: Updates the progress bar.

    Raises:
        ValueError: If chunks remain undone.
    """
    context = multiprocessing.get_context("spawn")
    arguments = ("shards", "root", "batch_size", "workers", "device", "trusted", "max_pixels")
    values = {name: getattr(work, name) for name in arguments}
    processes = [
        context.Process(target=main, args=(Work(rank=rank, ranks=work.ranks, local=rank, **values),))
        for rank in range(work.ranks)
    ]
    try:
        for process in processes:
            process.start()
        while sum(process.is_alive() for process in processes):  # of all: asking buries the dead
            show()
            time.sleep(POLL_SECONDS)
        show()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid:
                process.join()
    if missing := shards.missing():
        codes = [process.exitcode for process in processes]
        raise ValueError(f"{len(missing)} of {len(shards)} chunks are not done; the ranks ended with status {codes}")


def images_done(shards: Shards) -> int:
    """The number of images in finished shards, plus those that ranks report as done in other chunks.

    Args:
        shards: The shards.
    """
    missing = shards.missing()
    done = len(shards.items) - sum(len(shards.rows(number)) for number in missing)
    claims = claimed(shards.folder / "claims")
    return done + sum(claims.get(number, 0) for number in missing)
