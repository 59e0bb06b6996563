"""The steps of a run of `experiment=dsh` without what surrounds a training: images on the device, a step as CUDA graph.

python graph.py --run <run directory> --steps 150000 --seconds 200 --out steps.json

Goes on from the run's checkpoint, which `simsearch train` made by its first step, and puts the new weights there.
Network, loss, optimizer and scheduler are those of the run's config. Batches are permutations of the training images,
drawn by a generator of its own, so they are not those of `simsearch train`. On a CPU the steps are the same, without a
graph.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simsearch import configs, saved_run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARM, LOOK = 3, 500  # steps before a graph is captured, steps between two looks at loss and clock


class Step:
    """One step of the optimizer on the images at `index`, mirrored where `mirrored` says so."""

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, batch: int
    ) -> None:
        self.model, self.optimizer, self.images, self.labels = model, optimizer, images, labels
        self.index = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
        self.mirrored = torch.zeros(batch, dtype=torch.bool, device=DEVICE)
        self.loss = torch.zeros((), device=DEVICE)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.rates: list[float] = []
        self.done = 0

    def once(self) -> None:
        images = self.images[self.index]
        images = torch.where(self.mirrored[:, None, None, None], images.flip(3), images)
        loss = self.model.loss(self.model.network(images), self.labels[self.index])
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def __call__(self) -> None:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        if DEVICE.type == "cpu" or self.done < WARM:
            self.optimizer.zero_grad(set_to_none=True)
            self.once()
        else:
            if rates != self.rates:  # a graph has the rates of its capture
                self.optimizer.zero_grad(set_to_none=True)
                self.graph, self.rates = torch.cuda.CUDAGraph(), rates
                with torch.cuda.graph(self.graph):
                    self.once()
            assert self.graph is not None
            self.graph.replay()
        self.done += 1


def train(folder: Path, steps: int, seconds: float) -> dict[str, Any]:
    """Trains a run directory's network and writes it back."""
    run = saved_run.open_run(folder, trusted=True)
    path = folder / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    data = configs.build_data(run.config)
    model = configs.build(run.config["model"]).to(DEVICE).train()
    state = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("network.")}
    model.network.load_state_dict({name.removeprefix("network."): value for name, value in state.items()})
    built = model.configure_optimizers()
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    rows = data.split.train
    images = data.collection.images[rows].to(DEVICE)
    labels = data.collection.column(data.split.test.attribute)[rows].to(DEVICE)
    batch = run.config["sampler"]["batch_size"]
    step, epoch = Step(model, optimizer, images, labels, batch), len(rows) // batch
    draw = torch.Generator().manual_seed(run.config["seed"])
    begun, number, losses = time.perf_counter(), int(checkpoint["global_step"]), []
    order = mirrored = torch.empty(0)
    while number < steps:
        place = number % epoch
        if place == 0 or not len(order):
            order = torch.randperm(len(rows), generator=draw).to(DEVICE)
            mirrored = (torch.rand(len(rows), generator=draw) < 0.5).to(DEVICE)
        step.index.copy_(order[place * batch : (place + 1) * batch])
        step.mirrored.copy_(mirrored[place * batch : (place + 1) * batch])
        step()
        scheduler.step()
        number += 1
        if number % LOOK == 0 or number == steps:
            losses.append(float(step.loss))
            if not math.isfinite(losses[-1]):
                raise SystemExit(f"the loss is {losses[-1]} at step {number}")
            if time.perf_counter() - begun > seconds:
                break
    spent = time.perf_counter() - begun
    for name, value in model.network.state_dict().items():
        checkpoint["state_dict"][f"network.{name}"] = value.cpu()
    checkpoint["global_step"] = number
    torch.save(checkpoint, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    report = {"steps": number, "seconds": spent, "images a second": step.done * batch / spent, "device": str(DEVICE)}
    return report | {f"loss each {LOOK} steps": losses[:: max(1, len(losses) // 20)]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.write_text(json.dumps(train(given.run, given.steps, given.seconds), indent=1) + "\n", encoding="utf-8")
