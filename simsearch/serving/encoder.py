"""An encoder in its own thread, which batches images of concurrent requests."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simsearch.search.describe import encode
from simsearch.serving.backend_choice import Choice
from simsearch.serving.limits import Busy
from simsearch.types import Encoder


@dataclass(frozen=True, eq=False)
class _Job:
    future: Future[Any]
    image: Tensor | None = None
    call: Callable[[Encoder], Any] | None = None


class EncoderWorker:
    """Describes images for several catalogs and requests. Each user holds it between `retain` and `release`.

    The first image waits up to `wait_ms` for others. Images of one shape, up to `batch_size`, go through the encoder
    together. If an image fails, only its own request fails. The thread ends once nobody holds the worker.

    Args:
        encoder: The encoder.
        batch_size: Largest number of images per forward pass.
        wait_ms: How long the first image waits for others, in milliseconds.
        queue_length: Largest number of waiting jobs.
        runtime: The chosen runtime of the encoder's networks, or None.
    """

    def __init__(
        self, encoder: Encoder, *, batch_size: int, wait_ms: float, queue_length: int, runtime: Choice | None = None
    ) -> None:
        self.encoder, self.runtime = encoder.eval(), runtime
        self.size, self.fit = encoder.input_size, encoder.fit
        self._batch_size, self._wait, self._most = batch_size, wait_ms / 1e3, queue_length
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._users = 1
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """The number of waiting jobs."""
        return self._jobs.qsize()

    def retain(self) -> bool:
        """Holds the worker. False if it has already ended."""
        with self._lock:
            self._users += self._users > 0
            return self._users > 0

    def release(self) -> None:
        """Releases the worker."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._jobs.put(None)

    def describe(self, image: Tensor) -> Future[Tensor]:
        """The descriptor (D,) of an image, as a future.

        Args:
            image: uint8 (3, h, w), at the encoder's size and fit.

        Raises:
            Busy: If the queue is full, or if nobody holds the worker.
        """
        return self._put(_Job(Future(), image=image))

    def call(self, function: Callable[[Encoder], Any]) -> Future[Any]:
        """The result of `function(encoder)`, as a future. The function runs between batches.

        Args:
            function: A function of the encoder.

        Raises:
            Busy: If the queue is full, or if nobody holds the worker.
        """
        return self._put(_Job(Future(), call=function))

    def warm_up(self) -> None:
        """Describes a grey image, so that the first request does not pay for lazy initialisation."""
        height = self.size if self.fit == "square" else max(1, 3 * self.size // 4)
        self.describe(torch.full((3, height, self.size), 128, dtype=torch.uint8)).result()

    def _put(self, job: _Job) -> Future[Any]:
        with self._lock:  # so that no job comes after the end, where it would wait for ever
            if self._jobs.qsize() >= self._most or self._users == 0:
                raise Busy
            self._jobs.put(job)
        return job.future

    def _run(self) -> None:
        closing = False
        while not closing:
            first = self._jobs.get()
            if first is None:
                return
            batch, closing = self._collect(first)
            live = [job for job in batch if job.future.set_running_or_notify_cancel()]
            shapes: dict[tuple[int, ...], list[_Job]] = {}
            for job in live:
                if job.image is not None:
                    shapes.setdefault(tuple(job.image.shape), []).append(job)
                else:
                    self._call(job)
            for jobs in shapes.values():
                self._describe(jobs)

    def _collect(self, first: _Job) -> tuple[list[_Job], bool]:
        """The batch that starts with `first`, and whether it is the last one."""
        batch, deadline = [first], time.monotonic() + self._wait
        while len(batch) < self._batch_size:
            try:
                job = self._jobs.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                return batch, True
            batch.append(job)
        return batch, False

    def _describe(self, jobs: list[_Job]) -> None:
        try:
            vectors = encode(self.encoder, torch.stack([job.image for job in jobs if job.image is not None]))
        except Exception as error:  # it belongs to one of these requests, not to the worker
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
            else:
                for job in jobs:
                    self._describe([job])
            return
        for job, vector in zip(jobs, vectors, strict=True):
            if torch.isfinite(vector).all():
                job.future.set_result(vector.clone())
            else:
                job.future.set_exception(ValueError("the encoder returned NaN or infinity for this image"))

    def _call(self, job: _Job) -> None:
        assert job.call is not None
        try:
            job.future.set_result(job.call(self.encoder))
        except Exception as error:
            job.future.set_exception(error)
