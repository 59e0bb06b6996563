"""Two real processes against one: gradients of a loss that sees the rows of all ranks, and sums that are reduced."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import in_ranks
from pytorch_metric_learning import losses as pml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simsearch.functional.gather import gather_rows
from simsearch.losses.classification import ClassificationLoss
from simsearch.losses.dsh import DSHLoss
from simsearch.losses.hashnet import HashNetLoss
from simsearch.losses.memory import CrossBatchMemory
from simsearch.losses.triplet import BatchHardTripletLoss
from simsearch.metrics.retrieval import RetrievalMetrics
from simsearch.models.trained import TrainedRetriever

ROWS, STEPS, BITS = 6, 3, 8

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "dsh": DSHLoss,
    "hashnet": HashNetLoss,
    "batch-hard": BatchHardTripletLoss,
    "multi-similarity": pml.MultiSimilarityLoss,
    "xbm": lambda: CrossBatchMemory(pml.ContrastiveLoss(), size=30, dimension=BITS, start=1),
    "classification": lambda: ClassificationLoss(BITS, 4),  # has parameters of its own
}


class Net(nn.Module):
    """The least that a trained family needs."""

    bits, dimension, input_size = BITS, BITS, 4

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(48, 16), nn.Linear(16, BITS)
        self.provenance = {"weights": "none"}

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(image.flatten(1))))

    embed = forward


class Step(nn.Module):
    """The loss of a network's outputs, of all ranks."""

    def __init__(self, network: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        return self.loss(gather_rows(self.network(image)), gather_rows(label))


class Lightning(nn.Module):
    """A LightningModule's training step, so that DDP sees it."""

    def __init__(self, slices: int | None) -> None:
        super().__init__()
        self.retriever = TrainedRetriever(
            Net(), DSHLoss(), partial(torch.optim.SGD, lr=1.0), gather=True, freeze_batchnorm=True, slices=slices
        )

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        batch = {"image": image, "label": label, "index": torch.arange(len(label))}
        return self.retriever.training_step(batch, 0)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Images (12, 3, 4, 4) and labels of a few steps, as one process sees them."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(2 * ROWS, 3, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, 4, (2 * ROWS,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def make(name: str) -> nn.Module:
    torch.manual_seed(1)
    return Lightning(None if name == "step" else 4) if name in ("step", "slices") else Step(Net(), LOSSES[name]())


def gradients(module: nn.Module, rows: slice) -> list[dict[str, Tensor]]:
    """Of each step the loss and the gradient of every parameter."""
    results = []
    for image, label in batches():
        module.zero_grad()
        loss = module(image[rows].to(next(module.parameters()).dtype), label[rows])
        loss.backward()
        named = {name.removeprefix("module."): p.grad.clone() for name, p in module.named_parameters()}
        results.append({"loss": loss.detach(), **named})
    return results


NAMES = [*LOSSES, "step", "slices"]


def gallery() -> Tensor:
    return torch.randn(41, 12, generator=torch.Generator().manual_seed(0))


def described(codes: Tensor, first: int) -> RetrievalMetrics:
    metric = RetrievalMetrics((1,), bits=12)
    rows = first + torch.arange(len(codes))
    metric.update("gallery", codes, rows % 3, rows)
    metric.update("query", codes[:3], rows[:3], rows[:3])
    return metric


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    results: dict[str, object] = {}
    for name in NAMES:
        module = make(name)
        module = module if name in ("step", "slices") else module.double()
        results[name] = gradients(DistributedDataParallel(module), own)
    results["order"] = gather_rows(torch.tensor([[rank, 10], [rank, 11]]))
    messages = []
    for uneven in (torch.zeros(3 + rank, 2), torch.zeros(3 + rank, dtype=torch.int64)):
        try:
            gather_rows(uneven)
        except ValueError as error:
            messages.append(str(error))
    results["uneven"] = messages
    codes = gallery()
    metric = described(codes[:25] if rank == 0 else codes[25:], 25 * rank)
    with metric.sync_context():
        together = metric.code_statistics()
    results["codes"] = [together, metric.code_statistics()]  # and again its own
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    in_ranks(_rank, 2, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_two_ranks_are_those_of_the_large_batch(name, ranks):
    module = make(name)
    single = name in ("step", "slices")  # a training step's embeddings are float32 whatever the network
    wanted = gradients(module if single else module.double(), slice(None))
    for rank in ranks:
        for got, want in zip(rank[name], wanted, strict=True):
            assert got.keys() == want.keys()
            for parameter, value in want.items():
                near = {"rtol": 1e-5, "atol": 1e-6} if single else {"rtol": 1e-10, "atol": 1e-12}
                torch.testing.assert_close(got[parameter], value, **near, msg=lambda m, p=parameter: f"{p}: {m}")
                assert value.any()  # nothing was compared with nothing


def test_rows_come_in_rank_order_on_every_rank(ranks):
    for rank in ranks:
        assert rank["order"].tolist() == [[0, 10], [0, 11], [1, 10], [1, 11]]


def test_uneven_batches_are_refused_on_every_rank(ranks):
    for rank in ranks:
        assert len(rank["uneven"]) == 2
        assert all("batches of [3, 4] items" in message for message in rank["uneven"])


def test_one_process_keeps_its_rows():
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows) is rows


def test_code_statistics_are_summed_over_ranks(ranks):
    codes = gallery()
    whole = described(codes, 0).code_statistics()
    for rank, own in zip(ranks, (codes[:25], codes[25:]), strict=True):
        together, alone = rank["codes"]
        assert together == pytest.approx(whole, abs=1e-12)
        assert alone == pytest.approx(described(own, 0).code_statistics(), abs=1e-12)
