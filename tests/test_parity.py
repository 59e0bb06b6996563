"""Two real processes against one: what the frozen family is fitted to, and what the pool mines."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import in_ranks
from torch import Tensor, nn

from simsearch.callbacks.mining import TripletMining
from simsearch.callbacks.training import DataParallel
from simsearch.data.collection import Collection
from simsearch.data.datamodule import RetrievalDataModule
from simsearch.data.protocols import OfficialSplit
from simsearch.data.samplers import MinedTriplets, ShuffledBatches
from simsearch.functional.collectives import gather_batches
from simsearch.functional.whitening import Moments
from simsearch.index.binarize import ITQ, Sign
from simsearch.losses.triplet import TripletLoss
from simsearch.models.backbones import Backbone
from simsearch.models.frozen import FrozenRetriever, Whitening
from simsearch.models.pooling import MAC
from simsearch.models.trained import TrainedRetriever

TRAIN, TEST, SIDE, BATCH = 101, 10, 12, 20  # the last batch is short; of two ranks one row is over
BINARIZERS = {"itq": partial(ITQ, 6, seed=3), "sign": partial(Sign, 6)}


class Pictures(RetrievalDataModule):
    """Noise over the patterns of 5 classes."""

    def read(self) -> Collection:
        generator = torch.Generator().manual_seed(0)
        n = TRAIN + TEST
        labels = torch.arange(n) % 5
        patterns = torch.rand(5, 3, SIDE, SIDE, generator=generator)
        noise = torch.rand(n, 3, SIDE, SIDE, generator=generator)
        return Collection(
            name="patterns",
            images=(255 * (0.3 * patterns[labels] + 0.7 * noise)).byte(),
            labels=labels[:, None],
            attributes=("class",),
            classes=(tuple("abcde"),),
            is_test=torch.arange(n) >= TRAIN,
        )


def data(sampler: Any) -> Pictures:
    protocol = OfficialSplit("p", gallery="train", exclude_self=True, validation=None)
    return Pictures(protocol, sampler=sampler)


class Network(nn.Module):
    """A map and a projection, L2-normalised: the least that triplets train."""

    bits, dimension, input_size, fit = None, 6, SIDE, "square"

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 10, 4, stride=4), nn.Linear(90, 6)
        self.provenance = {"weights": "none"}

    def prepare(self, images: Tensor, rows: Tensor) -> None:
        pass

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.normalize(self.head(torch.tanh(self.body(image.float() / 255 - 0.5)).flatten(1)), dim=1)

    embed = forward


def trainer(folder: str, world: int, callbacks: list[pl.Callback], epochs: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", devices=world, max_epochs=epochs, callbacks=callbacks, logger=False,
        strategy=DataParallel(process_group_backend="gloo") if world > 1 else "auto", default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip


def frozen(binarizer: str) -> FrozenRetriever:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 24, 4, stride=4), nn.ReLU())
    backbone = Backbone(
        network, name="tiny", size=SIDE, mean=(127.0,) * 3, std=(127.0,) * 3, runtime="torch",
        provenance={"weights": "file", "sha256": "of the test", "source": "", "library": ""},
    )  # fmt: skip
    whitening = Whitening(12, power=0.5)
    return FrozenRetriever(backbone, MAC(), whitening, binarizer=BINARIZERS[binarizer](), scales=(1.0, 1.4), sample=70)


class Spy(pl.Callback):
    """Writes down the triplets of each mining, and what was logged about it."""

    def __init__(self) -> None:
        self.triplets: list[Tensor] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.triplets.append(trainer.train_dataloader.sampler._triplets.clone())


class Mining(TripletMining):
    """Keeps what it would log: there is no logger."""

    def __init__(self, spy: Spy) -> None:
        super().__init__(pool=63, per_query=3, margin=0.3, batch_size=13, seed=5)
        self.spy = spy

    def _log(self, trainer: pl.Trainer, values: dict[str, float]) -> None:  # type: ignore[override]
        self.spy.logged.append(values)


def everything(folder: str, world: int) -> dict[str, Any]:
    """What a process of `world` comes to."""
    results: dict[str, Any] = {}
    for name in BINARIZERS:
        model = frozen(name)
        sampler = partial(ShuffledBatches, batch_size=BATCH // world, seed=7)
        trainer(folder, world, [], 1).fit(model, data(sampler))
        results[name] = {n: v for n, v in model.state_dict().items() if not n.startswith("backbone.")}
    torch.manual_seed(2)
    spy = Spy()
    module = TrainedRetriever(Network(), TripletLoss(0.3), partial(torch.optim.SGD, lr=0.05))
    sampler = partial(MinedTriplets, triplets=8 // world, batches=4)
    trainer(folder, world, [Mining(spy), spy], 3).fit(module, data(sampler))
    results["triplets"], results["logged"] = spy.triplets, spy.logged
    results["weights"] = {n: v.detach() for n, v in module.state_dict().items()}
    return results


def vectors() -> Tensor:
    return torch.randn(9, 4, generator=torch.Generator().manual_seed(0))


def _rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {  # as torch.distributed.run would have it
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    results = everything(folder, 2)  # which leaves the process group open
    moments = Moments.zeros(4)
    if rank == 1:  # rank 0 has none
        moments.add(vectors())
    moments.reduce(torch.device("cpu"))
    results["moments"] = [moments.count, moments.total, moments.outer]
    parts = [[], [vectors()[:4], vectors()[4:]]][rank]
    results["gathered"] = [gather_batches(parts, 4), gather_batches([], 4)]
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    in_ranks(_rank, 2, str(folder), port)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return everything(str(tmp_path_factory.mktemp("alone")), 1)


@pytest.mark.parametrize("name", BINARIZERS)
def test_whitening_and_codes_are_those_of_one_process(name, ranks, alone):
    for rank in ranks:
        assert rank[name].keys() == alone[name].keys()
        for part, wanted in alone[name].items():
            assert wanted.any()
            difference = (rank[name][part] - wanted).norm() / wanted.norm()
            assert difference < 1e-6 if "whitening" in part else difference < 1e-5, part
    for part, value in ranks[0][name].items():
        assert torch.equal(value, ranks[1][name][part]), part  # to the last bit: codes of both must compare


def test_the_pool_mines_the_triplets_of_one_process(ranks, alone):
    assert len(alone["triplets"]) == 3
    assert len({str(t.tolist()) for t in alone["triplets"]}) == 3
    for rank in ranks:
        for got, wanted in zip(rank["triplets"], alone["triplets"], strict=True):
            assert wanted.shape == (32, 3)
            assert torch.equal(got, wanted)
        for got, wanted in zip(rank["logged"], alone["logged"], strict=True):
            assert got == pytest.approx(wanted, rel=1e-4)
    names = {name for values in alone["logged"] for name in values}
    assert names == {"mining/active", "mining/loss", "mining/staleness", "mining/age"}


def test_training_on_them_ends_in_the_same_weights(ranks, alone):
    for name, wanted in alone["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], wanted, rtol=1e-4, atol=1e-6)
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])


def test_a_rank_without_items_takes_the_others(ranks):
    wanted = Moments.zeros(4)
    wanted.add(vectors())
    for rank in ranks:
        count, total, outer = rank["moments"]
        assert count == 9
        assert torch.equal(total, wanted.total)
        assert torch.equal(outer, wanted.outer)
        gathered, nothing = rank["gathered"]
        assert torch.equal(gathered, vectors())
        assert nothing.shape == (0, 4)
